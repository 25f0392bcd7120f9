from __future__ import annotations

import pytest
import torch

from stepdistill.data.prompts import all_captions, open_prompts
from stepdistill.data.shapes import attributes_of
from stepdistill.errors import RequestError


def test_shapes_never_end_and_are_those_of_the_seed():
    endless, other = open_prompts("shapes", seed=1), open_prompts("shapes", seed=2)
    ids = torch.tensor([3, 2**61])
    assert endless.count is None and all(attributes_of(text) is not None for text in endless.captions(ids))
    assert endless.captions(ids) != other.captions(ids) and endless.identity != other.identity
    with pytest.raises(ValueError, match="endless"):
        all_captions(endless)


def test_a_file_has_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffa cat\n\n  a dog \na cat\n", encoding="utf-8")
    prompts = open_prompts(str(path))
    assert prompts.count == 3 and all_captions(prompts) == ["a cat", "a dog", "a cat"]


@pytest.mark.parametrize("name, held", [("p.csv", 'prompt,seed\n"a cat, red",1\na dog,2\n'),
                                        ("p.jsonl", '{"caption": "a cat, red"}\n\n{"caption": ["a dog", "a '
                                         'hound"]}\n')])
def test_tables_of_prompts(tmp_path, name, held):
    (tmp_path / name).write_text(held)
    assert all_captions(open_prompts(tmp_path / name)) == ["a cat, red", "a dog"]


@pytest.mark.parametrize("name, held, what",
                         [("p.csv", "words\na cat\n", "line 2 of .*p.csv' has no text, caption or prompt"),
                                              ("p.csv", "text\n", "has no prompt in it"),
                                              ("p.jsonl", "a cat\n", "line 1 of .*should be a table in JSON"),
                                              ("p.jsonl", '{"text": 3}\n', "line 1")])
def test_bad_tables_of_prompts(tmp_path, name, held, what):
    (tmp_path / name).write_text(held)
    with pytest.raises(RequestError, match=what):
        open_prompts(tmp_path / name)


def test_a_list_is_taken_as_it_stands():
    prompts = open_prompts(["a cat", "a dog"])
    assert prompts.captions(torch.tensor([1, 0, 1])) == ["a dog", "a cat", "a dog"]
    assert prompts.identity != open_prompts(["a dog", "a cat"]).identity


@pytest.mark.parametrize("spec", ["a cat", "missing.txt", [], ["a cat", ""], ["a cat", 3]])
def test_what_is_no_source_of_prompts_is_refused(spec):
    with pytest.raises(RequestError, match="prompts"):
        open_prompts(spec)


@pytest.mark.parametrize("content, what", [(b"\n \n", "no prompt"), (b"\xff\xfe\x00", "UTF-8")])
def test_bad_files_are_named(tmp_path, content, what):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=f"bad.txt.*{what}"):
        open_prompts(path)

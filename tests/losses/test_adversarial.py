from math import log

import pytest
import torch

from stepdistill.losses.adversarial import (
    discriminator_loss,
    generator_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    r1,
)

F64 = torch.float64


def test_what_each_game_costs_where_nobody_can_tell():
    zero = torch.zeros(3, 2, dtype=F64)
    assert (generator_loss(zero).tolist() == [[pytest.approx(log(2))] * 2] * 3
            and discriminator_loss(zero, zero)[0, 0].item() == pytest.approx(2 * log(2)))
    assert hinge_generator_loss(zero).abs().max() == 0 and (hinge_discriminator_loss(zero, zero) == 2).all()


@pytest.mark.parametrize("loss", [discriminator_loss, hinge_discriminator_loss])
def test_to_tell_right_costs_nothing(loss):
    assert loss(torch.tensor(50.0), torch.tensor(-50.0)) < 1e-9 and loss(torch.tensor(-50.0), torch.tensor(50.0)) > 90


def test_the_hinge_has_margins_and_the_student_has_none():
    real, fake = (torch.tensor(values, dtype=F64, requires_grad=True)
                  for values in ([-2.0, 0.5, 1.5], [-1.5, -0.5, 2.0]))
    assert ([g.tolist() for g in torch.autograd.grad(hinge_discriminator_loss(real, fake).sum(), (real, fake))]
            == [[-1, -1, 0], [0, 1, 1]])
    assert torch.autograd.grad(hinge_generator_loss(fake).sum(), fake)[0].tolist() == [-1, -1, -1]


def test_r1_is_the_square_of_a_linear_head_and_trains_it():
    """Of several maps the sum; of tanh(w x) it is (1 - tanh^2)^2 w^2, and its slope in w is known too."""
    g = torch.Generator().manual_seed(0)
    one, two = torch.randn(3, 2, 2, dtype=F64, generator=g), torch.randn(5, dtype=F64, generator=g)
    inputs = [torch.randn(4, *w.shape, dtype=F64, generator=g).requires_grad_() for w in (one, two)]
    logits = torch.stack([(x * w).flatten(1).sum(1) for x, w in zip(inputs, (one, two))], 1)
    torch.testing.assert_close(r1(logits, inputs), (one.square().sum() + two.square().sum()).expand(4))
    w, x = torch.tensor(0.7, dtype=F64, requires_grad=True), torch.tensor([[0.4]], dtype=F64, requires_grad=True)
    penalty, y = r1((w * x).tanh(), [x]), torch.tensor(0.28, dtype=F64).tanh()
    assert penalty.item() == pytest.approx(((1 - y**2) ** 2 * 0.49).item())
    slope, = torch.autograd.grad(penalty.sum(), w)
    assert slope.item() == pytest.approx((2 * 0.7 * (1 - y**2) ** 2 - 0.49 * 4 * 0.4 * y * (1 - y**2) ** 2).item())

"""How a student leaves: as files of diffusers that are proved, before they are called done, to sample as it did."""
from .extract import Extracted, extract
from .folder import load, open_export, read_settings
from .formats import check
from .proof import Proof, prove
from .student import Lora, Student
from .write import export_student

__all__ = ["Extracted", "Lora", "Proof", "Student", "check", "export_student", "extract", "load", "open_export",
           "prove", "read_settings"]

"""A glance tells what files register, without their libraries, and leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def printed(code):
    """What a new interpreter prints, which has imported nothing."""
    command = [sys.executable, "-c", "import sys; from latentwire.utils.glance import glance\n" + code]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env={"PYTHONPATH": str(ROOT)})
    assert not done.returncode, done.stderr
    return done.stdout.split("\n")[:-1]


def test_a_glance_tells_settings_and_conditions_as_they_are_and_the_real_ones_can_be_imported_afterwards():
    seen, real = printed("""
def told():
    encoders = glance("latentwire.models.encoders.base").ENCODERS
    settings = [(n, e.chooses_tokens, e.reads_answers, vars(e.Settings())) for n, e in encoders.items()]
    return settings, glance("latentwire.conditions.base").conditions_help()

print(told())
assert "torch" not in sys.modules
import torch
print(told())
from latentwire.models.encoders.base import Encoder
assert issubclass(Encoder, torch.nn.Module)
""")
    assert seen == real and "encoder_id" in seen and "token_budget" in seen


def test_what_files_do_with_libraries_as_they_are_imported_is_done_to_stand_ins(tmp_path):
    (tmp_path / "looked.py").write_text("""
import torch.nn.functional as F
from nosuchlibrary import Base, constant
from nosuchlibrary.deeper import decorator

class Kind(Base):
    limit = constant.of(3).more

    @decorator(option=1)
    def fits(self, x: F.Tensor | None, y: Base[int]) -> "Kind":
        return 7

assert Kind().fits(None, None) == 7
""")
    assert printed(f"""
import latentwire.utils
sys.modules["latentwire.utils"].__path__.append({str(tmp_path)!r})
kind = glance("latentwire.utils.looked").Kind
print(kind.__name__, sorted(name for name in sys.modules if "nosuch" in name or "looked" in name))
""") == ["Kind []"]

"""Make torchvision importable beside a build of torch for CPUs; `make` runs it after the installation.

PyPI's torchvision is compiled against torch with CUDA. Beside a CPU build its library cannot be loaded, and the import
fails: "operator torchvision::nms does not exist". timm and transformers import torchvision, and use neither of the two
operators that the import asks for. So this script declares both of them in the installed package, in this environment
only. A torchvision that can be imported stays as it is.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

DECLARATIONS = """import torch
_declared = torch.library.Library("torchvision", "DEF")
_declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def imports() -> str:
    """The error of `import torchvision` in a process of its own; empty if it works."""
    ended = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True, check=False)
    return ended.stderr if ended.returncode else ""


def main() -> None:
    """Declare the operators if their absence is what fails; any other error ends the script with its text."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or not (error := imports()):
        return
    if "operator torchvision::nms does not exist" not in error:
        sys.exit(error)
    module = Path(spec.origin).with_name("_meta_registrations.py")
    module.write_text(DECLARATIONS + module.read_text(encoding="utf-8"), encoding="utf-8")
    if error := imports():
        sys.exit(error)
    print("torchvision: two operators declared, since its library does not fit this build of torch")


if __name__ == "__main__":
    main()

# Types are checked alike whether torch is installed or not; without this, `import torch` could mean a folder of ours.
from typing import Any

def __getattr__(name: str) -> Any: ...

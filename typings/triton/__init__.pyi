# Types are checked alike whether triton is installed or not; without this, `import triton` could mean a folder of ours.
from typing import Any

def __getattr__(name: str) -> Any: ...

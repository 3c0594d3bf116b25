"""Drop-in functions for other code bases: their names and signatures, their conventions, these kernels.

`liger`, `trl`, `verl`, `easyr1` and `open_r1` import torch and this package only, never the library they stand in for.
Each says which version it follows. `apply(module)` of the last four puts the functions in place of the library's own
and returns a `Handle` with `report()` and `undo()`. What a function can't do raises; nothing is ignored in silence.
"""

from ._patch import Handle, Replacement

__all__ = ["Handle", "Replacement"]

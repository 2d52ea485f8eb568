"""Make Triton's interpreter fast enough for a test suite: import this module before the kernels run.

The interpreter patches `triton.language` anew at every call of a jitted function from another, including `tl.sum`
and `tl.zeros`, which takes a hundred times as long as the work. Once per launch is enough.
"""

from __future__ import annotations

from typing import Any

import triton
from triton.runtime import interpreter

_patched: set[bool] = set()


def _call_device_function(function: Any, *args: Any, **kwargs: Any) -> Any:
    of_triton = function.fn.__module__.startswith("triton.")  # these see triton.language.core, ours triton.language
    if of_triton not in _patched:
        interpreter._patch_lang(function.fn)
        _patched.add(of_triton)
    return function.rewrite()(*args, **kwargs)


_launch = interpreter.GridExecutor.__call__


def _launch_with_fresh_patches(executor: Any, *args: Any, **kwargs: Any) -> Any:
    _patched.clear()
    return _launch(executor, *args, **kwargs)


if triton.knobs.runtime.interpret and interpreter.GridExecutor.__call__ is _launch:
    interpreter.InterpretedFunction.__call__ = _call_device_function
    interpreter.GridExecutor.__call__ = _launch_with_fresh_patches

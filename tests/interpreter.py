"""Makes Triton's interpreter faster. It patches triton.language in every call of a device function, which takes half of
its time. All but the first patch of a launch change nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


def patch_languages_once() -> None:
    """Each module of the language is patched once per launch."""
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another Triton than the pinned one
        return
    patch = interpreter._patch_lang
    patched: set[Any] = set()  # in the present launch

    @cache
    def languages(function: Callable[..., Any]) -> frozenset[Any]:
        values = function.__globals__.values()  # type: ignore[attr-defined]
        return frozenset(module for module in (tl, tl.core) if any(value is module for value in values))

    class Scope:
        """The patches of a launch."""

        def __init__(self, scope: Any) -> None:
            self.scope = scope

        def restore(self) -> None:
            patched.clear()
            self.scope.restore()

    def patch_lang(function: Callable[..., Any]) -> Scope | None:
        wanted = languages(function)
        if wanted <= patched:
            return None  # a device function, which restores nothing
        patched.update(wanted)
        return Scope(patch(function))

    interpreter._patch_lang = patch_lang

"""Writes csrc/layout.h from fused_optim/engine/layout.py:

python csrc/make_layout.py
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "fused_optim/engine/layout.py"
HEADER = HERE / "layout.h"

TOP = """\
// Made by csrc/make_layout.py from fused_optim/engine/layout.py; a test fails where it is not current. Do not edit it.
// clang-format off
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FUSED_HD __host__ __device__ __forceinline__
#else
#define FUSED_HD inline __attribute__((always_inline))
#endif

namespace fused_optim {
"""

BOTTOM = """\
// Entries of chunk_table.
FUSED_HD constexpr int64_t chunk_of(int64_t entry) { return entry >> kEntryChunkShift; }
FUSED_HD constexpr int64_t row_of(int64_t entry) {
  return (entry >> kEntryRowShift) & ((int64_t{1} << kEntryRowBits) - 1);
}
FUSED_HD constexpr bool is_unaligned(int64_t entry) { return (entry & kEntryUnalignedBits) != 0; }
FUSED_HD constexpr int64_t chunk_entry(int64_t chunk, int64_t row, int64_t signature, bool unaligned) {
  return chunk << kEntryChunkShift | row << kEntryRowShift | signature << kEntrySignatureShift | int64_t{unaligned};
}

// Format of a stream of a row.
FUSED_HD constexpr Format format_of(int64_t signature, int stream) {
  return static_cast<Format>((signature >> (kSignatureFieldBits * stream)) & kAbsent);
}
FUSED_HD constexpr int64_t in_signature(int64_t format, int stream) { return format << (kSignatureFieldBits * stream); }

}  // namespace fused_optim
"""


def constant(name: str) -> str:
    """kRowNumel of ROW_NUMEL, and kFloat32 of FORMAT_FLOAT32."""
    return "k" + "".join(part.capitalize() for part in name.removeprefix("FORMAT_").split("_"))


def comments(text: str, struct: str) -> dict[str, str]:
    """The comments beside the fields of a NamedTuple."""
    (body,) = re.findall(rf"^class {struct}\(NamedTuple\):\n(.*?)(?=^\S)", text, re.DOTALL | re.MULTILINE)
    return dict(re.findall(r"^    (\w+): .*?  # (.*)$", body, re.MULTILINE))


def struct(name: str, fields: tuple[str, ...], prefix: str, notes: dict[str, str], generic: bool) -> list[str]:
    """A struct of the same fields, and the function that reads it from a row of the array."""
    kind = "T" if generic else "double"
    template = ["template <class T>"] if generic else []
    full, snake = f"{name}<T>" if generic else name, re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
    lines = [f"// {notes['']}", *template, f"struct {name} {{"]
    lines += [f"  {kind} {field};" + (f"  // {notes[field]}" if field in notes else "") for field in fields]
    lines += ["};", ""]
    value = "T({})" if generic else "{}"
    columns = (constant(f"{prefix}_{field.upper()}") for field in fields)
    reads = ", ".join(value.format(f"in[{column}]") for column in columns)
    return [*lines, *template, f"FUSED_HD {full} read_{snake}(const double* in) {{", f"  return {{{reads}}};", "}", ""]


def header() -> str:
    text, columns = SOURCE.read_text(), runpy.run_path(str(SOURCE))
    layout: dict[str, int] = columns["LAYOUT"]
    structs: dict[str, Any] = columns["STRUCTS"]
    lines = [TOP]
    notes = {prefix: comments(text, kind.__name__) for prefix, kind in structs.items()}
    notes[""] = dict(re.findall(r"^([A-Z_]+) = .*?  # (.*)$", text, re.MULTILINE))
    for name, number in layout.items():
        prefix, _, rest = name.partition("_")
        note = notes[prefix].get(rest.lower()) if prefix in structs else notes[""].get(name)
        kind = "int64_t" if name in ("EMPTY", "EMA_BEGUN") else "int"
        if prefix != "FORMAT":
            lines.append(f"constexpr {kind} {constant(name)} = {number};" + (f"  // {note}" if note else ""))
    codes = [f"{constant(name)} = {number}" for name, number in layout.items() if name.startswith("FORMAT_")]
    lines += ["", "// How a stream stores its values.", f"enum Format {{ {', '.join(codes)} }};", ""]
    for prefix, generic in (("GROUP", False), ("SCALAR", True)):
        kind = structs[prefix]
        about = {"": " ".join(kind.__doc__.split()), **notes[prefix]}
        lines += struct(kind.__name__, kind._fields, prefix, about, generic)
    lines += ["// The whole layout by name, which every module shows to Python.", "struct LayoutEntry {"]
    lines += ["  const char* name;", "  int64_t number;", "};", "constexpr LayoutEntry kLayout[] = {"]
    lines += [f'    {{"{name}", {constant(name)}}},' for name in layout]
    return "\n".join([*lines, "};", "", BOTTOM])


if __name__ == "__main__":
    HEADER.write_text(header())

"""The walkers alone, without torch: tables built by hand, run under sanitizers. Also the dtype conversions that the
walkers share."""

import ctypes
import platform
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from cases import CASES
from commands import ROOT, rule_structs, run

from fused_optim.engine import modules

pytestmark = pytest.mark.codegen
WALKERS = {
    "cpu": ["tests/cpp/walk_cpu.cpp", *(f"csrc/cpu/{name}.cpp" for name in ("step", "grads", "probe", "threads"))],
    "cuda-emulated": ["tests/cpp/walk_cuda.cpp", "csrc/cuda/emulate.cpp"],
}
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@needs_gxx
@pytest.mark.parametrize("walker", WALKERS)
def test_walker_against_double_precision(walker: str, tmp_path: Path) -> None:
    """A driver without torch walks random tables, with the address and undefined-behaviour sanitizers. -O0, because
    optimizing the instrumented code takes longer than running it."""
    driver = str(tmp_path / "driver")
    sources = ["tests/cpp/driver.cpp", *WALKERS[walker]]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    run(["g++", "-std=c++17", "-O0", "-fopenmp", *sanitizers, *sources, "-o", driver])
    said = run([driver, "0", "5"])
    line = r"^(\w+): \d+ comparisons, (\d+) of them with a finite number, dtypes of params: (\d+)"
    found = re.findall(line, said, re.MULTILINE)
    assert {name for name, *_ in found} == {case.ours.rule.name for case in CASES} | {"muon"}
    for name, compared, dtypes in found:
        assert int(compared) > 200_000 and int(dtypes) == 4, name


@needs_gxx
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_threads_share_the_pieces(sanitizer: str, tmp_path: Path) -> None:
    """Each piece is taken once, in the specified order, even if threads start late or never. After a pass in which the
    calling thread had to wait for the others, it works alone for a while. The thread sanitizer does not support OpenMP
    regions."""
    driver, flags = str(tmp_path / "threads"), ["-std=c++17", "-O1", "-g", "-fopenmp", f"-fsanitize={sanitizer}"]
    run(["g++", *flags, "tests/cpp/threads.cpp", "-o", driver])
    assert "every piece once" in run([driver, *(["without regions"] if sanitizer == "thread" else [])])


@needs_gxx
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_round_as_torch(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit: every two-byte number, the floats halfway between two neighbours, and the floats next to those."""
    name = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    source, library = tmp_path / "convert.cpp", tmp_path / "convert.so"
    source.write_text(f"""#include "{ROOT}/csrc/convert.h"
extern "C" void narrow(uint16_t* out, const float* in, int n) {{
  for (int i = 0; i < n; ++i) out[i] = fused_optim::float_to_{name}(in[i]);
}}
extern "C" void widen(float* out, const uint16_t* in, int n) {{
  for (int i = 0; i < n; ++i) out[i] = fused_optim::{name}_to_float(in[i]);
}}
""")
    # With the flags of the CPU walker, because the vectorized loop must be correct.
    run(["g++", "-std=c++17", "-O3", "-fno-trapping-math", "-fPIC", "-shared", str(source), "-o", str(library)])
    convert = ctypes.CDLL(str(library))

    halves = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    wide = torch.empty(65536)
    convert.widen(ctypes.c_void_p(wide.data_ptr()), ctypes.c_void_p(halves.data_ptr()), 65536)
    exact = halves.view(dtype).float()
    number = ~exact.isnan()
    assert torch.equal(wide.view(torch.int32)[number], exact.view(torch.int32)[number])
    assert wide[~number].isnan().all()

    finite = exact[exact.isfinite()].double().sort().values
    middle = torch.cat([(finite[1:] + finite[:-1]) / 2, torch.tensor([65520.0, -65520.0, 1e30, -1e30])]).float()
    infinity = torch.full_like(middle, torch.inf)
    floats = torch.cat([exact, middle, middle.nextafter(infinity), middle.nextafter(-infinity)])
    narrow = torch.empty(len(floats), dtype=torch.int16)
    convert.narrow(ctypes.c_void_p(narrow.data_ptr()), ctypes.c_void_p(floats.data_ptr()), len(floats))
    number = ~floats.isnan()
    assert torch.equal(narrow[number], floats.to(dtype).view(torch.int16)[number])
    assert narrow.view(dtype)[~number].isnan().all()


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="tests instruction sets of x86-64")
@pytest.mark.parametrize(("isa", "register"), [("avx2", "ymm"), ("avx512", "zmm")])
def test_cpu_walker_is_vectorised(isa: str, register: str) -> None:
    """Each loop over elements computes in full vector registers, in the modules as they are built. One line in a rule
    that the compiler cannot vectorize makes the step six times slower, and no other test would notice."""
    module = modules.load(f"_cpu_{isa}")
    if isinstance(module, str):
        pytest.skip(module)  # a developer's build may leave out instruction sets
    wide = wide_arithmetic(str(module.__file__), register)
    for rule in rule_structs():
        loops = {name: count for name, count in wide.items() if re.search(rf"{LOOP}<.*\b{rule}\b", name)}
        assert loops, f"no loop of {rule} was found"
        assert not [name for name, count in loops.items() if not count and not re.search(TAIL, name)], rule
        inlined = [count for name, count in wide.items() if re.search(rf"\b{rule}\b", name)]
        assert sum(inlined, Counter()).keys() == {"ps", "pd"}, rule  # float and double
    for function in ("squares", "scale"):
        assert any(count for name, count in wide.items() if function in name), function


LOOP = "(update_block|update_pairs|measure_block)"
# Pairs of bfloat16 numbers are updated by update_pairs. update_block updates the last one, if their number is odd.
TAIL = r"update_block<\(Pass\)0, \w+, float, \d, false, BFloat16, BFloat16, BFloat16\b"


def wide_arithmetic(file: str, register: str) -> dict[str, Counter[str]]:
    """How many floating-point instructions of each function compute in these registers, by their suffix."""
    found: dict[str, Counter[str]] = {}
    function = ""
    for line in run(["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", file]).splitlines():
        if begin := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = re.sub(r"\(anonymous namespace\)::|fused_optim::(avx\w+::)?", "", begin[1]).split(">(")[0] + ">"
            found.setdefault(function, Counter())
        elif operation := re.search(rf"\tv(?:div|sqrt|mul|add|sub|fn?m\w+)(p[sd]) .*%{register}", line):
            found[function][operation[1]] += 1
    return found

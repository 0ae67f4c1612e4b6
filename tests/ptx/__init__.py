"""Runs the compiled GPU kernels without a GPU: their PTX is interpreted.

kernel.py        parses the PTX text of one kernel
arithmetic.py    what they compute, on arrays
instructions.py  the instructions that the interpreter supports, and their effect on registers
accesses.py      loads and stores
machine.py       runs the blocks of a launch
memory.py        global memory: every access must be aligned and within a live tensor
native/          C, compiled by gcc on first use: stand-ins for the CUDA driver and the CUDA runtime
toolchain.py     runs the compilers and keeps their output
launched.py      runs the launches that the stand-ins receive, and records them
backends.py      the backends "triton-ptx" and "cuda-ptx"
"""

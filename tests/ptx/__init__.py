"""The GPU kernels as they are compiled, run without a GPU: their PTX in an interpreter.

kernel.py        PTX text: what one kernel consists of
instructions.py  which instructions the interpreter knows, and what they do to registers
accesses.py      loads and stores
machine.py       runs the blocks of a launch
memory.py        global memory: every access must be aligned and within a live tensor
native/          C, compiled by gcc when first needed: stand-ins for the CUDA driver and the CUDA runtime
toolchain.py     the compilers and what they have made
launched.py      runs what the stand-ins are asked to launch, and keeps a record of it
backends.py      the backends "triton-ptx" and "cuda-ptx"
"""

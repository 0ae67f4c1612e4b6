"""The Triton kernels: portable GPU code, installed as `fused_optim.triton_kernels`."""

"""A solution of googlenet-1: a convolution has out * (in * kernel * kernel + 1) parameters."""

direct_5x5 = 32 * (192 * 25 + 1)
reduced_5x5 = 16 * (192 + 1) + 32 * (16 * 25 + 1)
block_parameters = 64 * 193 + (96 * 193 + 128 * (96 * 9 + 1)) + reduced_5x5 + 32 * 193
flops_factor = (224 / 96) ** 2

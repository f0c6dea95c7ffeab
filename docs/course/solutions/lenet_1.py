"""A solution of lenet-1: filters x (weights + bias), and 2 x weights x positions."""

conv1_parameters = 6 * (1 * 5 * 5 + 1)
conv1_flops = 2 * 6 * (1 * 5 * 5) * 28 * 28
conv2_parameters = 16 * (6 * 5 * 5 + 1)
conv2_flops = 2 * 16 * (6 * 5 * 5) * 10 * 10

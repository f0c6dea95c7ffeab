"""A solution of vgg-1."""

three_3x3 = 3 * 256 * 256 * 3 * 3
one_7x7 = 256 * 256 * 7 * 7
receptive_field = 1 + 5 * (3 - 1)
largest_layer = (512 * 7 * 7 + 1) * 4096

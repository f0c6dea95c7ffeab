"""A solution of alexnet-1."""

smallest_image = 67  # backwards from 1x1: 3, 7, 7 + 8 = 15 before the poolings; 11 + 4 * 14 before the convolution
image_for_55 = 11 + 4 * 54
# Each kernel adds (its size - 1) times the product of the strides before it.
receptive_field = 11 + 2 * 4 + 4 * 8 + 2 * 8 + 2 * 16 + 2 * 16 + 2 * 16 + 2 * 16
share_of_first_linear = (256 * 5 * 5 + 1) * 4096 / 29_983_434

"""vgg-1: work these numbers out, then check.

求出下面几个数，然后检查。
"""

# Weights, without biases, of convolutions with 256 channels in and out / 输入输出均为 256 通道的卷积，不计偏置
three_3x3 = 0  # three 3x3 in a row / 三个 3x3 相连
one_7x7 = 0  # one 7x7 / 一个 7x7
receptive_field = 0  # side of what five 3x3 in a row see / 五个 3x3 相连的感受野边长
largest_layer = 0  # parameters, with biases, of VGG-19's largest layer / VGG-19 最大一层的参数量（含偏置）

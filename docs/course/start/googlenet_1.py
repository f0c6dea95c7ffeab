"""googlenet-1: work these numbers out for the first Inception block, then check. Count weights and biases.

针对第一个 Inception 块求出下面几个数，然后检查。权重和偏置都要算。
"""

direct_5x5 = 0  # parameters of a 5x5 convolution from its 192 channels to 32 / 直接从 192 通道到 32 通道的 5x5 卷积
reduced_5x5 = 0  # of the branch as it is: 1x1 to 16 channels first / 实际的分支：先用 1x1 降到 16 通道
block_parameters = 0  # of all four branches / 四个分支合计
flops_factor = (
    0.0  # by which images of 224 instead of 96 pixels raise GoogLeNet's FLOPs / 图片从 96 变为 224 像素，FLOPs 的倍数
)

"""lenet-1: work these four numbers out by hand for configs/lenet.yaml, write them here, then check.

为 configs/lenet.yaml 手算下面四个数，填好后再检查。
"""

conv1_parameters = 0
conv1_flops = 0  # of one image's forward pass, 2 for each multiply-add / 每张图一次前向，一次乘加计 2
conv2_parameters = 0
conv2_flops = 0

"""alexnet-1: work these numbers out for configs/alexnet.yaml, then check.

为 configs/alexnet.yaml 求出下面几个数，然后检查。
"""

smallest_image = 0  # side in pixels of the smallest image that AlexNet accepts / AlexNet 能接受的最小边长（像素）
image_for_55 = 0  # side of the smallest image whose first map is 55x55 / 第一张特征图为 55x55 的最小图片边长
receptive_field = 0  # side, in pixels, of what one value after the last pooling sees / 最后一次池化后的感受野边长
share_of_first_linear = 0.0  # of all parameters, 0 to 1 / 第一个全连接层占总参数量的比例，0 到 1

"""ResNets on CIFAR-100: training, and what a memory adds."""

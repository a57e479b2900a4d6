"""What is measured: the shapes of real networks' normalizations."""

# ResNet-50: channels, size, what follows, how often
RESNET50 = [
    (64, 112, "relu", 1),
    (64, 56, "relu", 6), (256, 56, "add", 3), (256, 56, "plain", 1),
    (128, 56, "relu", 1), (128, 28, "relu", 7), (512, 28, "add", 4), (512, 28, "plain", 1),
    (256, 28, "relu", 1), (256, 14, "relu", 11), (1024, 14, "add", 6), (1024, 14, "plain", 1),
    (512, 14, "relu", 1), (512, 7, "relu", 5), (2048, 7, "add", 3), (2048, 7, "plain", 1),
]  # fmt: skip

# The distinct (channels, size) among them, the largest activations first
RESNET50_LAYERS = sorted({(channels, size) for channels, size, _, _ in RESNET50}, key=lambda it: -it[0] * it[1] ** 2)

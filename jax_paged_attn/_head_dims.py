"""Head dims that "fused" takes. CMake writes this file from the lists of CMakeLists.txt."""

# Pairs: the head dim of keys, and that of values.
FUSED_HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128))
# Where the values are in the keys.
FUSED_MLA_HEAD_DIMS = ((576, 512),)

"""Head dims that "fused" takes. CMake writes this file from the lists of CMakeLists.txt."""

# Pairs: the head dim of keys, and that of values.
FUSED_HEAD_DIMS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128))
# By its MLA kernels: where the values are in the keys, and where they have a pool of their own.
FUSED_MLA_HEAD_DIMS = ((576, 512), (512, 512))
FUSED_WIDE_HEAD_DIMS = ((512, 512),)

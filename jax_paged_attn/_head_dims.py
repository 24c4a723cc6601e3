"""Head dims that "fused" takes. CMake writes this file from JPA_FUSED_DECODE_HEAD_DIMS of CMakeLists.txt."""

FUSED_HEAD_DIMS = (64, 80, 96, 128, 192, 256)

// The kernels for AVX-512 F, BW, DQ and VL. Flags: see CMakeLists.txt.
#define JPA_ISA avx512
#define JPA_ISA_AVX512
#include "engines/cpu/kernel_table.h"

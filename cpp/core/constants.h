// Factors between natural logarithms and those of base 2, in which softmax states count.
#pragma once

namespace jpa {

inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr double kLn2 = 0.693147180559945309417;

}  // namespace jpa

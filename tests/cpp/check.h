// A test is a function that calls CHECK; main returns how many checks failed.
#pragma once

#include <cstdio>

namespace jpa::test {

inline int failures = 0;

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      ++::jpa::test::failures;                                             \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fputc('\n', stderr);                                            \
    }                                                                      \
  } while (false)

}  // namespace jpa::test

// The state of an online softmax (Milakov & Gimelshein, 2018) of one row, in units of log 2.
#pragma once

#include <cmath>

#include "core/constants.h"
#include "device/exp2.cuh"
#include "device/ptx.cuh"

namespace jpa::device {

struct SoftmaxState {
  // Probabilities of up to 2^8 are as exact as those of up to 1, in f16 and in bf16.
  static constexpr float kRescaleThreshold = 8.0f;

  // The maximum of the scores seen so far; after RescaleIfNeeded it may be up to kRescaleThreshold less.
  float maximum = -INFINITY;
  float sum = 0.0f;  // of 2^(score - maximum)

  // The number that scores are counted from: a row that has seen nothing must not compute -inf - -inf.
  __device__ float origin() const { return maximum == -INFINITY ? 0.0f : maximum; }

  // Takes a new maximum; returns the factor of what was summed up before.
  __device__ float Raise(float to) {
    const float before = maximum;
    maximum = fmaxf(maximum, to);
    const float factor = Exp2(before - origin());
    sum *= factor;
    return factor;
  }

  // Likewise, for scores counted from origin(), of which the largest is `to`. But a maximum that is at most
  // kRescaleThreshold too small stays: then the factor is 1, and sums are what they were (as in
  // FlashAttention-4). Returns what the scores have to be lowered by.
  __device__ float RescaleIfNeeded(float to, float* factor) {
    const float before = origin();
    *factor = 1.0f;
    if (maximum == -INFINITY ? to == -INFINITY : to <= kRescaleThreshold) return 0.0f;
    *factor = Exp2(maximum == -INFINITY ? -INFINITY : -to);
    maximum = before + to;
    sum *= *factor;
    return maximum - before;
  }

  // Adds another row's state; sets the factors of both rows' sums of values.
  __device__ void Merge(const SoftmaxState& other, float* factor, float* factor_of_other) {
    *factor = Raise(other.maximum);
    *factor_of_other = Exp2(other.maximum - origin());
    sum += other.sum * *factor_of_other;
  }

  // Adds a logit without a value (natural units); returns the factor of what was summed up before.
  __device__ float AddSink(float sink) {
    const float factor = Raise(sink * kLog2E);
    sum += Exp2(sink * kLog2E - origin());
    return factor;
  }

  // The factor of summed values: 1 / sum, 0 for a row that saw no key.
  __device__ float Normaliser() const { return sum == 0.0f ? 0.0f : Reciprocal(sum); }
  // log of the sum of exp, natural; -inf for a row that saw no key.
  __device__ float LogSumExp() const {
    return sum == 0.0f ? -INFINITY : (maximum + Log2(sum)) * static_cast<float>(kLn2);
  }
};

}  // namespace jpa::device

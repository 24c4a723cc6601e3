// Which decode kernel a call gets, and with how much shared memory.
#pragma once

#include <cstdint>

#include "core/problem.h"
#include "engines/fused/decode/args.h"
#include "engines/fused/run.h"

namespace jpa::fused {

// Where a sequence has no more query rows than that on average, a call is taken for one of decode rows and
// drafts, which seldom have more. Then no kernel goes in front of decode to plan prefill, and decode's last
// CTA does. If there are prompts after all, they start a little later.
inline constexpr int64_t kRowsOfDecode = 8;

// True if decode has the rows of all sequences, also of those that would be prefill's: in a call as small as
// a step of decode rows. Then prefill is not launched.
bool DecodeHasAll(const CallArgs& call, const Options& options);

// No kernel if MLA's take decode's place.
const DecodeDevice& ChooseDecode(const CallArgs& call, const Options& options, const Device& device);

// Sets how many CTAs are needed (TilesPerCta), and returns their stages.
StageRing ChooseStages(const Device& device, const DecodeDevice& decode, bool prefills, DecodeArgs* args);

}  // namespace jpa::fused

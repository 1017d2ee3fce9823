// The kinds of matching losses by name, for the operators that have them.
#pragma once

#include <c10/util/Exception.h>

#include <string_view>

#include "kernels/matching_terms.h"

namespace r2f::glue {

inline MatchingKind matching_kind(const char* op, std::string_view name) {
  if (name == "layer_cosine") return MatchingKind::kLayerCosine;
  if (name == "cosine") return MatchingKind::kCosine;
  TORCH_CHECK(name == "l2", op, ": kind must be layer_cosine, cosine or l2");
  return MatchingKind::kL2;
}

}  // namespace r2f::glue

// Makes the entries of one instruction set's table; included by each. See w8a8.h on static functions.
#pragma once
#include "flash_backward.h"
#include "flash_forward.h"

namespace tinyllm {
namespace {

template <class S>
int64_t flash_scratch_bytes(const Attention& problem, bool backward) {
  return backward ? Backward<S>(problem, Arena{nullptr}).used
                  : Forward<S>(problem, Arena{nullptr}).used;
}

template <class S, class In>
void flash_forward(const Attention& problem, int64_t task, void* scratch) {
  Forward<S>(problem, Arena{static_cast<char*>(scratch)}).template run<In>(task);
}

template <class S, class In>
void flash_backward(const Attention& problem, int64_t task, void* scratch) {
  Backward<S>(problem, Arena{static_cast<char*>(scratch)}).template run<In>(task);
}

template <class S, class In>
constexpr FlashIsa kFlashEntry = {flash_scratch_bytes<S>, flash_forward<S, In>,
                                  flash_backward<S, In>};

}  // namespace
}  // namespace tinyllm

// Which form a product takes. That follows from its shape, strides and dtype alone, so that its
// result doesn't depend on the number of threads.
#pragma once

#include "neuron_ext/cpu.h"

namespace neuron_ext::cpu {

enum class Form : std::uint8_t {
  kBlocked,     // operands are packed (gemm.cpp)
  kFewRows,     // of D: B is used where it lies (narrow.cpp)
  kFewColumns,  // the same with A and B exchanged
  kLongColumn,  // D is one long column: A's columns are added up (strips.cpp)
  kLongRows,    // many rows of A pass a small B
  kLongSums,    // many columns of A and rows of B add to a small D
};

const char* name_of(Form form);

Form form_of(const GemmDesc& desc);

/// Whether A, and what its prologue takes, are stored column by column.
bool has_contiguous_columns(const GemmDesc& desc);

}  // namespace neuron_ext::cpu

// The CPU's matrix product, START HERE: which kernel is chosen, and the loops around it, unless the
// product is a narrow one (narrow.cpp). No intrinsics; what is done to a vector is in the *-inl.h
// files, which kernels there are is in registry.cpp, and how a product is cut is in blocking.cpp.
#include <algorithm>
#include <cstddef>
#include <stdexcept>

#include "blocking.h"
#include "driver.h"
#include "log.h"

namespace neuron_ext::cpu {
namespace {

/// The panels of a block of A or B, `stride` apart, and the lowest exponent of each.
template <class S>
struct PackedBlock {
  const S* panels;
  std::int64_t stride;
  const S* lowest;
};

/// How all of B lies in memory once it's packed: the kernel that reads it; for each block of k, the
/// block's panels; then the lowest exponents of them all.
template <class S>
class PackedB {
 public:
  PackedB(const GemmKernel& kernel, std::int64_t n, std::int64_t k)
      : kernel_(kernel),
        kc_(std::max<std::int64_t>(1, block_of_k(kernel, k))),
        k_(k),
        blocks_(std::max<std::int64_t>(1, divide_up(k, kc_))),
        panels_(divide_up(n, kernel.nr)) {}

  std::int64_t size() const { return lowest(blocks_ * kc_); }

  PackedBlock<S> block(const void* packed, std::int64_t pc, std::int64_t kc, std::int64_t j) const {
    const S* const base = static_cast<const S*>(packed);
    return {base + panel(pc, kc, j), kernel_.nr * kernel_.row_size(kc),
            base + lowest(pc) + j / kernel_.nr};
  }

  /// Packs the panels of the columns from j on.
  void pack(const GemmFunctions& functions, const Operand& b, std::int64_t n, std::int64_t j,
            void* packed) const {
    S* const base = static_cast<S*>(packed);
    std::int64_t pc = 0;
    do {
      const std::int64_t kc = std::min(kc_, k_ - pc);
      base[lowest(pc) + j / kernel_.nr] =
          static_cast<S>(functions.pack_b(b, j, n - j, pc, kc, base + panel(pc, kc, j)));
      pc += kc;
    } while (pc < k_);
  }

 private:
  static constexpr std::int64_t kHead = kCacheLine / sizeof(S);

  std::int64_t panel(std::int64_t pc, std::int64_t kc, std::int64_t j) const {
    return kHead + panels_ * kernel_.nr * (pc / kc_) * kernel_.row_size(kc_) +
           j * kernel_.row_size(kc);
  }
  std::int64_t lowest(std::int64_t pc) const {
    const std::int64_t last = (blocks_ - 1) * kc_;
    return panel(last, k_ - last, panels_ * kernel_.nr) + panels_ * (pc / kc_);
  }

  const GemmKernel& kernel_;
  std::int64_t kc_, k_, blocks_, panels_;
};

const GemmKernel& kernel_of(const void* packed_b) {
  return **static_cast<const GemmKernel* const*>(packed_b);
}

/// A thread's use of a row's micro-kernel.
class Prepared {
 public:
  explicit Prepared(const GemmKernel& kernel) : kernel_(kernel) {
    if (kernel.prepare != nullptr) kernel.prepare();
  }
  ~Prepared() {
    if (kernel_.release != nullptr) kernel_.release();
  }
  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

 private:
  const GemmKernel& kernel_;
};

/// One product, cut into tasks:
///
///   for each task            tile of D and chunk of k; tasks are independent
///     for pc                 blocks of kc within the chunk
///       pack B[pc, tile]     into L2 or L3
///       for ic               groups of panels of mr rows
///         pack A[ic, pc]     into L2
///         for ir             panels of mr rows
///           for jr           panels of nr columns
///             micro-kernel   mr x nr sums in registers
///             epilogue       after the last block, while they are in L1
///
/// Where k is one block, the sums of one register tile at a time are all there is; else a tile's
/// sums wait in a buffer for the next block. Where k has several chunks, their sums are added, in
/// order, by `reduce`.
template <class S>
class BlockedProduct {
 public:
  BlockedProduct(const GemmKernel& kernel, const GemmDesc& desc, const GemmPointers& at,
                 const Blocking& cut)
      : kernel_(kernel),
        functions_(kernel.of(desc.dtype)),
        desc_(desc),
        at_(at),
        cut_(cut),
        a_(operand_a(desc, at)),
        b_(operand_b(desc, at)),
        whole_b_(kernel, desc.n, desc.k) {}

  void run(const ParallelFor& parallel_for) const {
    const std::int64_t tiles = cut_.tiles_m * cut_.tiles_n;
    if (cut_.chunks == 1) {
      parallel_for(tiles, 1, [&](std::int64_t begin, std::int64_t end) {
        with_buffer<S>(task_buffer, task_size() + sums_size(), [&](S* buffer) {
          const Prepared prepared(kernel_);
          for (std::int64_t tile = begin; tile < end; ++tile) {
            sum_chunk(tile, 0, buffer, buffer + task_size());
          }
        });
      });
      return;
    }
    S* const sums = reinterpret_cast<S*>(
        shared_buffer.reserve(static_cast<std::size_t>(cut_.tasks() * sums_size()) * sizeof(S)));
    parallel_for(cut_.tasks(), 1, [&](std::int64_t begin, std::int64_t end) {
      with_buffer<S>(task_buffer, task_size(), [&](S* buffer) {
        const Prepared prepared(kernel_);
        for (std::int64_t task = begin; task < end; ++task) {
          sum_chunk(task % tiles, task / tiles, buffer, sums + task * sums_size());
        }
      });
    });
    parallel_for(tiles, 1, [&](std::int64_t begin, std::int64_t end) {
      with_buffer<S>(task_buffer, cut_.tile_n, [&](S* buffer) {
        for (std::int64_t tile = begin; tile < end; ++tile) {
          reduce(tile, sums + tile * sums_size(), tiles * sums_size(), buffer);
        }
      });
    });
  }

 private:
  /// Where a tile lies in D.
  struct Place {
    std::int64_t i, rows, j, columns;
    bool sums_a = false;  // each row of A is summed by the tasks of one column of tiles
  };

  Place place_of(std::int64_t tile) const {
    const std::int64_t i = tile % cut_.tiles_m * cut_.tile_m, j = tile / cut_.tiles_m * cut_.tile_n;
    return {i, std::min(cut_.tile_m, desc_.m - i), j, std::min(cut_.tile_n, desc_.n - j),
            desc_.has_a_sum && j == 0};
  }

  std::int64_t depth(std::int64_t kc) const { return divide_up(kc, kernel_.kr); }
  // A packed panel may run over by less than a vector (pack-inl.h).
  std::int64_t panel_size(std::int64_t width) const {
    return aligned(width * kernel_.row_size(cut_.kc) + kernel_.lanes);
  }
  /// The block's panels, and the lowest exponent of each.
  std::int64_t block_size(std::int64_t width, std::int64_t tile) const {
    return tile / width * panel_size(width) + aligned(tile / width);
  }
  std::int64_t a_size() const { return block_size(kernel_.mr, group_m()); }
  std::int64_t b_size() const {
    return at_.packed_b != nullptr ? 0 : block_size(kernel_.nr, cut_.tile_n);
  }
  std::int64_t careful_b_size() const { return aligned(kernel_.nr * cut_.kc + kernel_.lanes); }
  std::int64_t careful_size() const {
    if (kernel_.careful == nullptr) return 0;
    return tile_size() + careful_b_size() + aligned(kernel_.careful->mr * cut_.kc + kernel_.lanes);
  }
  std::int64_t task_size() const { return a_size() + b_size() + careful_size() + cut_.tile_n; }
  // Panels of A that are packed together: neighbours share lines where A's columns are contiguous.
  // Four are slower by 1 to 3 %, 16 no faster; all of a tile's push too much out of L2.
  static constexpr std::int64_t kGroup = 8;
  std::int64_t group_m() const { return std::min(kGroup * kernel_.mr, cut_.tile_m); }
  static std::int64_t aligned(std::int64_t count) {
    return round_up(count, static_cast<std::int64_t>(kCacheLine / sizeof(S)));
  }

  /// Sums: register tiles, row by row of them (one only, where none has to wait), then a sum for
  /// every row of A.
  bool waits() const { return cut_.chunks > 1 || !cut_.has_one_block(); }
  std::int64_t tile_size() const { return kernel_.mr * kernel_.nr; }
  std::int64_t tiles_size() const { return waits() ? cut_.tile_m * cut_.tile_n : tile_size(); }
  std::int64_t sums_size() const { return tiles_size() + aligned(cut_.tile_m); }
  S* register_tile(S* sums, std::int64_t ir, std::int64_t jr) const {
    return waits() ? sums + (ir / kernel_.mr * (cut_.tile_n / kernel_.nr) + jr / kernel_.nr) *
                                tile_size()
                   : sums;
  }

  /// The sums of one tile over one chunk of k, and D where that is all of k.
  void sum_chunk(std::int64_t tile, std::int64_t chunk, S* buffer, S* sums) const {
    const Place place = place_of(tile);
    S* const a_room = buffer;
    S* const b_room = a_room + a_size();
    S* const careful_room = b_room + b_size();
    S* const bias = careful_room + careful_size();
    S* const a_sums = sums + tiles_size();
    const bool finishes = cut_.chunks == 1;
    const Epilogue<S> epilogue(kernel_, desc_, at_, place.j, finishes ? place.columns : 0, bias);
    if (place.sums_a) std::fill_n(a_sums, round_up(place.rows, kernel_.mr), S{0});

    const std::int64_t first = chunk * cut_.chunk_k;
    const std::int64_t last = std::min(first + cut_.chunk_k, desc_.k);
    std::int64_t pc = first;
    do {  // once at least: without any k, D is the epilogue of zeros
      const std::int64_t kc = std::min(cut_.kc, last - pc);
      const PackedBlock<S> b =
          at_.packed_b != nullptr ? whole_b_.block(at_.packed_b, pc, kc, place.j)
                                  : pack_block(functions_.pack_b, b_, kernel_.nr, place.j,
                                               place.columns, desc_.n, cut_.tile_n, pc, kc, b_room);
      PackedBlock<S> a;
      for (std::int64_t ir = 0; ir < place.rows; ir += kernel_.mr) {
        const std::int64_t rows = std::min(kernel_.mr, place.rows - ir);
        const std::int64_t panel = ir / kernel_.mr % kGroup;
        if (panel == 0) {
          a = pack_block(functions_.pack_a, a_, kernel_.mr, place.i + ir,
                         std::min(group_m(), place.rows - ir), desc_.m, group_m(), pc, kc, a_room);
        }
        const S* const a_panel = a.panels + panel * a.stride;
        if (place.sums_a) kernel_.sum_panel(depth(kc), a_panel, a_sums + ir);
        for (std::int64_t jr = 0; jr < place.columns; jr += kernel_.nr) {
          const std::int64_t columns = std::min(kernel_.nr, place.columns - jr);
          const S* const b_panel = b.panels + jr / kernel_.nr * b.stride;
          S* const tile_sums = register_tile(sums, ir, jr);
          const bool is_exact = a.lowest[panel] + b.lowest[jr / kernel_.nr] >=
                                static_cast<S>(kernel_.lowest_exponents);
          if (!is_exact && kernel_.careful != nullptr) {
            multiply_carefully({place.i + ir, rows, place.j + jr, columns}, pc, kc, a_panel,
                               b_panel, careful_room, tile_sums, pc != first);
          } else {
            const Microkernel microkernel =
                is_exact ? kernel_.microkernel : kernel_.careful_microkernel;
            microkernel(rows, columns, depth(kc), a_panel, b_panel, tile_sums, pc != first);
          }
          if (finishes && pc + kc == last) {
            epilogue.store(place.i + ir, rows, place.j + jr, columns, tile_sums, kernel_.nr);
          }
        }
      }
      pc += kc;
    } while (pc < last);
    if (finishes && place.sums_a) store_a_sums(functions_, desc_, at_, place.i, place.rows, a_sums);
  }

  /// `count` rows of A or columns of B from mn on, of `all`, packed into `room` of a whole tile.
  PackedBlock<S> pack_block(PackPanel pack, const Operand& operand, std::int64_t width,
                            std::int64_t mn, std::int64_t count, std::int64_t all,
                            std::int64_t tile, std::int64_t pc, std::int64_t kc, S* room) const {
    // Where k isn't what's contiguous, a few k of all panels at a time: neighbours share pages, and
    // lines where they aren't whole ones, of which the caches can't keep those of a whole block of
    // k. Not where something is known of whole rows.
    constexpr std::int64_t kFewK = 16, kFewKOfLines = 64;
    const bool in_steps = operand.stride_mn == 1 && kernel_.known == 0;
    const bool of_lines = width * size_of(desc_.dtype) % std::int64_t{kCacheLine} == 0;
    const std::int64_t step = !in_steps ? std::max(kc, kFewK) : of_lines ? kFewKOfLines : kFewK;
    const std::int64_t stride = panel_size(width);
    S* const lowest = room + tile / width * stride;
    for (std::int64_t p = 0; p == 0 || p < kc; p += step) {
      for (std::int64_t panel = 0; panel * width < count; ++panel) {
        const std::int64_t first = mn + panel * width;
        const S in_step =
            static_cast<S>(pack(operand, first, all - first, pc + p, std::min(step, kc - p),
                                room + panel * stride + p / kernel_.kr * width));
        lowest[panel] = p == 0 ? in_step : std::min(lowest[panel], in_step);
      }
    }
    return {room, stride, lowest};
  }

  /// One register tile's sums where not all are exact: twice, to take each from where it's right.
  /// So it depends on an element's row and column alone, not on what else is in their panels.
  void multiply_carefully(const Place& place, std::int64_t pc, std::int64_t kc, const S* a_panel,
                          const S* b_panel, S* room, S* sums, bool add) const {
    const GemmKernel& careful = *kernel_.careful;
    const GemmFunctions& functions = careful.of(desc_.dtype);
    S* const careful_sums = room;
    S* const careful_b = careful_sums + tile_size();
    S* const careful_a = careful_b + careful_b_size();
    if (add) std::copy_n(sums, tile_size(), careful_sums);
    kernel_.microkernel(place.rows, place.columns, depth(kc), a_panel, b_panel, sums, add);
    functions.pack_b(b_, place.j, desc_.n - place.j, pc, kc, careful_b);
    for (std::int64_t r = 0; r < place.rows; r += careful.mr) {
      functions.pack_a(a_, place.i + r, desc_.m - (place.i + r), pc, kc, careful_a);
      careful.microkernel(std::min(careful.mr, place.rows - r), place.columns, kc, careful_a,
                          careful_b, careful_sums + r * kernel_.nr, add);
    }
    kernel_.take_careful(place.rows, depth(kc), a_panel, b_panel, careful_sums, sums);
  }

  /// Adds a tile's sums of all chunks, which lie `stride` apart, into the first chunk's, and
  /// finishes D.
  void reduce(std::int64_t tile, S* sums, std::int64_t stride, S* bias) const {
    const Place place = place_of(tile);
    const Epilogue<S> epilogue(kernel_, desc_, at_, place.j, place.columns, bias);
    const auto add_chunks = [&](S* first, std::int64_t count) {
      for (std::int64_t chunk = 1; chunk < cut_.chunks; ++chunk) {
        const S* const next = first + chunk * stride;
        for (std::int64_t e = 0; e < count; ++e) first[e] += next[e];
      }
    };
    for (std::int64_t ir = 0; ir < place.rows; ir += kernel_.mr) {
      const std::int64_t rows = std::min(kernel_.mr, place.rows - ir);
      for (std::int64_t jr = 0; jr < place.columns; jr += kernel_.nr) {
        S* const tile_sums = register_tile(sums, ir, jr);
        add_chunks(tile_sums, rows * kernel_.nr);
        epilogue.store(place.i + ir, rows, place.j + jr, std::min(kernel_.nr, place.columns - jr),
                       tile_sums, kernel_.nr);
      }
    }
    if (!place.sums_a) return;
    add_chunks(sums + tiles_size(), place.rows);
    store_a_sums(functions_, desc_, at_, place.i, place.rows, sums + tiles_size());
  }

  const GemmKernel& kernel_;
  const GemmFunctions& functions_;
  const GemmDesc& desc_;
  const GemmPointers& at_;
  const Blocking& cut_;
  const Operand a_, b_;
  const PackedB<S> whole_b_;
};

}  // namespace

void run_blocked(const GemmKernel& kernel, const GemmDesc& desc, const GemmPointers& at,
                 const ParallelFor& parallel_for) {
  const Blocking cut = choose_blocking(kernel, desc, parallel_for);
  log_choice(kernel, desc, &cut);
  visit_accumulator(
      desc.dtype, [&]<class S>(S) { BlockedProduct<S>(kernel, desc, at, cut).run(parallel_for); });
}

Packing packing_of(const GemmDesc& desc) {
  const GemmKernel& kernel = choose_packing(desc);
  return {&kernel, visit_accumulator(desc.dtype, [&]<class S>(S) {
            return PackedB<S>(kernel, desc.n, desc.k).size() * std::int64_t{sizeof(S)};
          })};
}

std::int64_t packing_steps(const Packing& packing, const GemmDesc& desc) {
  return std::max<std::int64_t>(1, divide_up(desc.n, packing.kernel->nr));
}

void pack_b(const Packing& packing, const GemmDesc& desc, const void* b, void* packed,
            std::int64_t begin, std::int64_t end) {
  const GemmKernel& kernel = *packing.kernel;
  if (begin == 0) *static_cast<const GemmKernel**>(packed) = &kernel;
  visit_accumulator(desc.dtype, [&]<class S>(S) {
    const PackedB<S> layout(kernel, desc.n, desc.k);
    for (std::int64_t j = begin * kernel.nr; j < std::min(end * kernel.nr, desc.n);
         j += kernel.nr) {
      layout.pack(kernel.of(desc.dtype), {b, desc.b_stride_n, desc.b_stride_k}, desc.n, j, packed);
    }
  });
}

void pack_b(const Packing& packing, const GemmDesc& desc, const void* b, void* packed,
            const ParallelFor& parallel_for) {
  const std::int64_t steps = packing_steps(packing, desc);
  const std::int64_t threads = threads_for(1, desc.n, desc.k, parallel_for);
  parallel_for(steps, divide_up(steps, threads), [&](std::int64_t begin, std::int64_t end) {
    pack_b(packing, desc, b, packed, begin, end);
  });
}

void gemm(const GemmDesc& desc, const GemmPointers& at, const ParallelFor& parallel_for) {
  if (!desc.is_valid() || desc.has_d_sum) {
    throw std::invalid_argument("a product's epilogue is one of several things");
  }
  if (desc.m == 0 || (desc.n == 0 && !desc.has_a_sum)) return;
  const GemmKernel& kernel =
      at.packed_b == nullptr ? choose_gemm(desc) : note_choice(kernel_of(at.packed_b));
  kernel.run(kernel, desc, at, parallel_for);
}

}  // namespace neuron_ext::cpu

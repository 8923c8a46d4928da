// What is under way while threads go on: copies, barriers with phases, groups of wgmmas. Each
// happens either when it is issued or as late as a GPU may let it happen, as the settings say.
#include <algorithm>
#include <cstring>
#include <limits>

#include "machine.h"

namespace neuron_ext::emulator {
namespace {

std::size_t offset_of(const Block& block, const void* shared, const char* instruction, Site site) {
  if (!is_shared(block, shared)) {
    fail("%s: not shared memory, at %s", instruction, describe(site).c_str());
  }
  return static_cast<std::size_t>(static_cast<const std::byte*>(shared) - block.shared);
}

}  // namespace

// ---- cp.async ----------------------------------------------------------------------------------

namespace {

void copy(const CopyAsync& copy) {
  if (copy.valid_bytes > 0) {  // else the source may be null
    std::memcpy(copy.shared, copy.global, static_cast<std::size_t>(copy.valid_bytes));
  }
  std::memset(copy.shared + copy.valid_bytes, 0,
              static_cast<std::size_t>(copy.bytes - copy.valid_bytes));
}

}  // namespace

void copy_async(void* shared, const void* global, int bytes, int valid_bytes) {
  const Site site = __builtin_return_address(0);
  Thread& thread = *machine.current;
  Block& block = *thread.block;
  const std::size_t offset = offset_of(block, shared, "copy_async", site);
  const auto size = static_cast<std::size_t>(bytes);
  // The source's alignment is asked for even where nothing is read.
  if (offset % size != 0 || reinterpret_cast<std::uintptr_t>(global) % size != 0) {
    fail("copy_async: not aligned to its %d bytes, at %s", bytes, describe(site).c_str());
  }
  if (valid_bytes > 0) {
    access_global(thread, global, static_cast<std::size_t>(valid_bytes), false, site);
  }
  access_shared(block, offset, size, true, thread.index, thread.clock, site);
  set_under_way(block, offset, size, true);
  thread.copies.push_back({static_cast<std::byte*>(shared), static_cast<const std::byte*>(global),
                           bytes, valid_bytes, site});
  if (!machine.settings.late_copies) copy(thread.copies.back());
}

void copy_async_commit() {
  Thread& thread = *machine.current;
  thread.groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}

void copy_async_wait(int pending) {
  Thread& thread = *machine.current;
  Block& block = *thread.block;
  while (static_cast<int>(thread.groups.size()) > pending) {
    for (const CopyAsync& done : thread.groups.front()) {
      if (machine.settings.late_copies) copy(done);
      const auto offset = static_cast<std::size_t>(done.shared - block.shared);
      const auto size = static_cast<std::size_t>(done.bytes);
      set_under_way(block, offset, size, false);
      access_shared(block, offset, size, true, thread.index, thread.clock, done.site);
    }
    thread.groups.pop_front();
  }
}

// ---- mbarrier ----------------------------------------------------------------------------------

namespace {

/// The barrier, which this thread must know to have been made.
Mbarrier& mbarrier_at(Thread& thread, void* address, Site site) {
  const auto found = thread.block->mbarriers.find(address);
  if (found == thread.block->mbarriers.end()) {
    fail("mbarrier used before mbarrier_init, at %s", describe(site).c_str());
  }
  const Mbarrier& barrier = found->second;
  if (kSeesAccesses && barrier.maker != thread.index &&
      thread.clock[static_cast<std::size_t>(barrier.maker)] < barrier.made_at) {
    fail("race on an mbarrier: used at %s, and nothing orders it after thread %d's mbarrier_init",
         describe(site).c_str(), barrier.maker);
  }
  return found->second;
}

void complete_phase_if_due(Block& block, Mbarrier& barrier) {
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.parity ^= 1;
  barrier.pending = barrier.arrivals;
  barrier.completed = barrier.arrived;
  make_ready(block, Wait::kMbarrier);
}

}  // namespace

void mbarrier_init(void* address, int arrivals) {
  const Site site = __builtin_return_address(0);
  Thread& thread = *machine.current;
  Block& block = *thread.block;
  const std::size_t offset = offset_of(block, address, "mbarrier_init", site);
  if (offset % 8 != 0 || arrivals < 1 || arrivals >= 1 << 20) {
    fail("mbarrier_init: bad alignment or count, at %s", describe(site).c_str());
  }
  if (block.mbarriers.count(address) != 0) {
    fail("mbarrier_init: it is one already, at %s", describe(site).c_str());
  }
  access_shared(block, offset, 8, true, thread.index, thread.clock, site);
  Mbarrier& barrier = block.mbarriers[address];
  barrier.arrivals = barrier.pending = arrivals;
  barrier.maker = thread.index;
  if (!kSeesAccesses) return;
  barrier.made_at = thread.clock[static_cast<std::size_t>(thread.index)];
  for (std::size_t c = offset / 2; c < offset / 2 + 4; ++c) block.cells[c].is_mbarrier = true;
}

void mbarrier_init_fence() {
  Thread& thread = *machine.current;
  for (auto& [address, barrier] : thread.block->mbarriers) {
    if (barrier.maker == thread.index) barrier.fenced = true;
  }
}

void mbarrier_arrive(void* address, std::uint32_t expected_bytes) {
  const Site site = __builtin_return_address(0);
  Thread& thread = *machine.current;
  Mbarrier& barrier = mbarrier_at(thread, address, site);
  if (barrier.pending == 0) {
    fail("mbarrier_arrive: more than the %d that the barrier was made for, at %s", barrier.arrivals,
         describe(site).c_str());
  }
  if (kSeesAccesses) {
    join(barrier.arrived, thread.clock);
    join(barrier.foreign, thread.foreign);
    tick(thread);
  }
  barrier.bytes += expected_bytes;
  --barrier.pending;
  complete_phase_if_due(*thread.block, barrier);
}

void mbarrier_wait(void* address, std::uint32_t parity) {
  const Site site = __builtin_return_address(0);
  Thread& thread = *machine.current;
  Mbarrier& barrier = mbarrier_at(thread, address, site);
  if (parity > 1) fail("mbarrier_wait: parity %u, at %s", parity, describe(site).c_str());
  while (barrier.parity == parity) wait(Wait::kMbarrier, site);
  if (!kSeesAccesses) return;
  join(thread.clock, barrier.completed);
  join(thread.foreign, barrier.foreign);
}

void async_proxy_fence() {
  // Everything this thread has written up to now; a later write has a later time.
  Thread& thread = *machine.current;
  tick(thread);
  if (kSeesAccesses) thread.proxy_fence = thread.clock[static_cast<std::size_t>(thread.index)];
}

// ---- the copy engine ---------------------------------------------------------------------------

int make_tensor_map(const void* base, int element_bytes, std::int64_t rows, std::int64_t columns,
                    std::int64_t row_bytes, int box_rows, int box_columns, int span,
                    TensorMap* map) {
  constexpr int kInvalidValue = 1;
  constexpr std::int64_t kLargest = std::int64_t{1} << 32;
  const int box_row_bytes = box_columns * element_bytes;
  if (reinterpret_cast<std::uintptr_t>(base) % 16 != 0 || row_bytes % 16 != 0 || row_bytes < 0 ||
      row_bytes >= std::int64_t{1} << 40 || rows < 1 || rows > kLargest || columns < 1 ||
      columns > kLargest || box_rows < 1 || box_rows > 256 || box_columns < 1 ||
      box_columns > 256 || box_row_bytes % 16 != 0 || (span != 0 && box_row_bytes > span)) {
    return kInvalidValue;
  }
  *map = {static_cast<std::byte*>(const_cast<void*>(base)),
          rows,
          columns,
          row_bytes,
          element_bytes,
          box_rows,
          box_columns,
          span};
  return 0;
}

namespace {

int box_bytes(const TensorMap& map) { return map.box_rows * map.box_columns * map.element_bytes; }

/// Calls f(offset in the box, address in the matrix or null) for each element of a box.
template <class F>
void for_each_element(const TensorMap& map, int row, int column, const F& f) {
  const std::size_t mask = map.span == 0 ? 0 : static_cast<std::size_t>(map.span / 16 - 1);
  for (int r = 0; r < map.box_rows; ++r) {
    for (int c = 0; c < map.box_columns; ++c) {
      const std::int64_t y = std::int64_t{row} + r, x = std::int64_t{column} + c;
      auto offset = static_cast<std::size_t>((r * map.box_columns + c) * map.element_bytes);
      offset ^= (offset >> 7 & mask) << 4;
      const bool inside = y >= 0 && y < map.rows && x >= 0 && x < map.columns;
      f(offset, inside ? map.base + y * map.row_bytes + x * map.element_bytes : nullptr);
    }
  }
}

std::size_t checked_box(const Block& block, const TensorMap& map, const void* shared,
                        const char* instruction, Site site) {
  const std::size_t offset = offset_of(block, shared, instruction, site);
  // The swizzle follows addresses, so a box must begin where its pattern does.
  if (offset % (map.span == 0 ? 128 : static_cast<std::size_t>(8 * map.span)) != 0) {
    fail("%s: box not aligned for its swizzle of %d bytes, at %s", instruction, map.span,
         describe(site).c_str());
  }
  return offset;
}

void complete(Block& block, const TmaLoad& load) {
  const auto size = static_cast<std::size_t>(load.map.element_bytes);
  const auto box = static_cast<std::size_t>(load.shared - block.shared);
  access_shared(block, box, static_cast<std::size_t>(box_bytes(load.map)), true, load.unit,
                load.clock, load.site);
  for_each_element(load.map, load.row, load.column,
                   [&](std::size_t offset, const std::byte* source) {
                     if (source == nullptr) {
                       std::memset(load.shared + offset, 0, size);
                     } else {
                       std::memcpy(load.shared + offset, source, size);
                     }
                   });
  Mbarrier& barrier = block.mbarriers[load.barrier];
  if (kSeesAccesses) join(barrier.arrived, load.clock);
  barrier.bytes -= box_bytes(load.map);
  complete_phase_if_due(block, barrier);
}

}  // namespace

void tma_load(void* shared, const TensorMap& map, void* address, int row, int column) {
  const Site site = __builtin_return_address(0);
  Thread& thread = *machine.current;
  Block& block = *thread.block;
  checked_box(block, map, shared, "tma_load", site);
  const Mbarrier& barrier = mbarrier_at(thread, address, site);
  if (!barrier.fenced) {
    fail("tma_load: no mbarrier_init_fence after its barrier's mbarrier_init, at %s",
         describe(site).c_str());
  }
  if (barrier.bytes <= 0) {
    fail("tma_load: its barrier expects no more bytes, at %s", describe(site).c_str());
  }
  TmaLoad load{static_cast<std::byte*>(shared), map, address, row, column, {}, 0, site};
  if (kSeesAccesses) {
    for_each_element(map, row, column, [&](std::size_t, const std::byte* source) {
      if (source != nullptr) {
        access_global(thread, source, static_cast<std::size_t>(map.element_bytes), false, site);
      }
    });
    const int unit = block.next_load_unit++ % kLoadUnits;
    load.unit = block.unit(unit);
    load.clock = thread.clock;
    load.clock[static_cast<std::size_t>(load.unit)] =
        ++block.unit_times[static_cast<std::size_t>(unit)];
  }
  if (machine.settings.late_copies) {
    block.loads.push_back(std::move(load));
  } else {
    complete(block, load);
  }
}

bool complete_one_load(Block& block) {
  if (block.loads.empty()) return false;
  // They may overtake each other.
  std::size_t chosen = 0;
  if (machine.settings.order == Order::kReverse) chosen = block.loads.size() - 1;
  if (machine.settings.order == Order::kShuffled) chosen = machine.random() % block.loads.size();
  const TmaLoad load = std::move(block.loads[chosen]);
  block.loads.erase(block.loads.begin() + static_cast<std::ptrdiff_t>(chosen));
  complete(block, load);
  return true;
}

namespace {

void store(const TmaStore& store) {
  for_each_element(store.map, store.row, store.column, [&](std::size_t offset, std::byte* target) {
    if (target != nullptr) {
      std::memcpy(target, store.shared + offset, static_cast<std::size_t>(store.map.element_bytes));
    }
  });
}

}  // namespace

void tma_store(const TensorMap& map, const void* shared, int row, int column) {
  const Site site = __builtin_return_address(0);
  Thread& thread = *machine.current;
  Block& block = *thread.block;
  const std::size_t offset = checked_box(block, map, shared, "tma_store", site);
  TmaStore issued{map, static_cast<const std::byte*>(shared), row, column, 0, 0, site};
  if (kSeesAccesses) {
    const auto size = static_cast<std::size_t>(box_bytes(map));
    const int unit = kLoadUnits + block.next_store_unit++ % kStoreUnits;
    issued.unit = block.unit(unit);
    issued.time = ++block.unit_times[static_cast<std::size_t>(unit)];
    Clock clock = thread.clock;
    clock[static_cast<std::size_t>(issued.unit)] = issued.time;
    check_proxy(block, offset, size, "tma_store");
    access_shared(block, offset, size, false, issued.unit, clock, site);
    for_each_element(map, row, column, [&](std::size_t, const std::byte* target) {
      if (target != nullptr) {
        access_global(thread, target, static_cast<std::size_t>(map.element_bytes), true, site);
      }
    });
  }
  if (!machine.settings.late_copies) store(issued);
  thread.stores.push_back(std::move(issued));
}

void tma_store_commit() {
  Thread& thread = *machine.current;
  thread.store_groups.push_back(std::move(thread.stores));
  thread.stores.clear();
}

void tma_store_wait_read(int pending) {
  Thread& thread = *machine.current;
  while (static_cast<int>(thread.store_groups.size()) > pending) {
    for (const TmaStore& done : thread.store_groups.front()) {
      if (machine.settings.late_copies) store(done);
      if (kSeesAccesses) {
        std::uint32_t& seen = thread.clock[static_cast<std::size_t>(done.unit)];
        seen = std::max(seen, done.time);
      }
    }
    thread.store_groups.pop_front();
  }
}

// ---- wgmma -------------------------------------------------------------------------------------

namespace {

struct ProductArgument {
  int n;
  DType dtype;
  float* d;
  const std::uint32_t* a_registers;
  std::uint64_t a, b;
  bool a_is_mn_major, b_is_mn_major, accumulate;
  Site site;

  bool same_as(const ProductArgument& other) const {
    return n == other.n && dtype == other.dtype && a == other.a && b == other.b &&
           (a_registers == nullptr) == (other.a_registers == nullptr) &&
           a_is_mn_major == other.a_is_mn_major && b_is_mn_major == other.b_is_mn_major &&
           accumulate == other.accumulate;
  }
};

void issue_products(Block& block, int first, void** arguments) {
  const auto& leader = *static_cast<ProductArgument*>(arguments[0]);
  Product product{leader.n,
                  leader.dtype,
                  leader.a,
                  leader.b,
                  leader.a_is_mn_major,
                  leader.b_is_mn_major,
                  leader.accumulate,
                  {},
                  {},
                  block.threads[first]->product_groups,
                  0};
  for (int i = 0; i < 128; ++i) {
    const auto& argument = *static_cast<ProductArgument*>(arguments[i]);
    const Thread& thread = *block.threads[first + i];
    if (!argument.same_as(leader)) {
      fail("wgmma: thread %d passes other operands than thread %d, at %s", first + i, first,
           describe(argument.site).c_str());
    }
    if (thread.product_groups != product.group) {
      fail("wgmma: thread %d has committed other groups than thread %d, at %s", first + i, first,
           describe(argument.site).c_str());
    }
    if (!thread.products_fenced) {
      fail("wgmma: no wgmma_fence at the beginning of its group, at %s",
           describe(argument.site).c_str());
    }
    product.d[static_cast<std::size_t>(i)] = argument.d;
    product.a_registers[static_cast<std::size_t>(i)] = argument.a_registers;
  }
  const auto warpgroup = static_cast<std::size_t>(first / 128);
  if (kSeesAccesses) {
    // It has seen what all of the warpgroup's threads have: the last may be the one that starts it.
    const std::size_t unit = kLoadUnits + kStoreUnits + warpgroup;
    Clock clock = block.threads[first]->clock;
    for (int i = 1; i < 128; ++i) {
      const Clock& other = block.threads[first + i]->clock;
      for (std::size_t k = 0; k < clock.size(); ++k) clock[k] = std::min(clock[k], other[k]);
    }
    const int agent = block.unit(static_cast<int>(unit));
    product.time = clock[static_cast<std::size_t>(agent)] = ++block.unit_times[unit];
    for_each_piece(product, [&](std::size_t offset) {
      check_proxy(block, offset, 16, "wgmma");
      access_shared(block, offset, 16, false, agent, clock, leader.site);
    });
  }
  if (!machine.settings.late_products) {
    multiply(block, product);
  } else if (!product.accumulate) {  // nothing that may be read is left in d
    for (float* d : product.d) {
      std::fill_n(d, product.n / 2, std::numeric_limits<float>::quiet_NaN());
    }
  }
  block.products[warpgroup].push_back(product);
}

void wgmma(ProductArgument argument) {
  collective("wgmma", kWarpgroup, 0, &argument, argument.site, issue_products);
}

}  // namespace

void wgmma_fence() { machine.current->products_fenced = true; }

void wgmma_commit() {
  Thread& thread = *machine.current;
  ++thread.product_groups;
  thread.products_fenced = false;
}

void wgmma_wait(int pending) {
  Thread& thread = *machine.current;
  const auto warpgroup = static_cast<std::size_t>(thread.index / kWarpgroup);
  std::deque<Product>& products = thread.block->products[warpgroup];
  // The first thread to wait completes them for all; the others then find them gone.
  while (!products.empty() && products.front().group < thread.product_groups - pending) {
    if (machine.settings.late_products) multiply(*thread.block, products.front());
    thread.block->products_done[warpgroup] = products.front().time;
    products.pop_front();
  }
  if (!kSeesAccesses) return;
  const auto unit = static_cast<std::size_t>(
      thread.block->unit(kLoadUnits + kStoreUnits + static_cast<int>(warpgroup)));
  thread.clock[unit] = std::max(thread.clock[unit], thread.block->products_done[warpgroup]);
}

void wgmma(int n, DType dtype, float* d, std::uint64_t a, bool a_is_mn_major, std::uint64_t b,
           bool b_is_mn_major, bool accumulate) {
  wgmma({n, dtype, d, nullptr, a, b, a_is_mn_major, b_is_mn_major, accumulate,
         __builtin_return_address(0)});
}

void wgmma(int n, DType dtype, float* d, const std::uint32_t* a, std::uint64_t b,
           bool b_is_mn_major, bool accumulate) {
  wgmma({n, dtype, d, a, 0, b, false, b_is_mn_major, accumulate, __builtin_return_address(0)});
}

void check_nothing_under_way(Block& block) {
  for (int i = 0; i < block.thread_count; ++i) {
    const Thread& thread = *block.threads[i];
    if (!thread.copies.empty() || !thread.groups.empty()) {
      fail("thread %d has ended before its copy_asyncs, which it doesn't wait for", i);
    }
    if (!thread.stores.empty() || !thread.store_groups.empty()) {
      fail("thread %d has ended before its tma_stores, which it doesn't wait for", i);
    }
  }
  for (const std::deque<Product>& products : block.products) {
    if (!products.empty()) fail("the block has ended before its wgmmas, which nobody waits for");
  }
  if (!block.loads.empty())
    fail("the block has ended before its tma_loads, which nobody waits for");
  for (const auto& [address, barrier] : block.mbarriers) {
    if (barrier.bytes != 0) fail("an mbarrier expects bytes that nobody loads");
  }
}

}  // namespace neuron_ext::emulator

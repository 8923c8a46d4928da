#include "packed_weights.h"

#include <atomic>
#include <list>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "glue.h"
#include "layer.h"
#include "neuron_ext/cpu.h"
#include "ops.h"

namespace neuron_ext {
namespace {

/// Whether a product of so few rows gains by it. Measured on Zen 4, 1024 x 1024, one thread: 1.03
/// to 1.4 times for 4 to 32 rows of f32 (4096 x 4096: 1.2 to 1.5), 1.1 to 1.8 for any rows of bf16;
/// but 0.8 to 0.9 for 1 to 3 rows of f32, which kernels of their own read where they lie. Only
/// batch-invariant products can't use those.
bool is_worth_packing(std::int64_t rows, DType dtype) {
  constexpr std::int64_t kFewestRows = 4;
  return rows >= kFewestRows || dtype == DType::kBFloat16 || batch_invariant();
}

/// A weight as a view of some tensor, which counts the changes made through any of its views. The
/// addresses of what has died can't come back: whoever holds a Key holds weak references too, and
/// with them the memory of the objects themselves.
struct Key {
  const void *tensor, *storage, *data;
  std::int64_t n, k, stride_n, stride_k;
  DType dtype;

  bool operator==(const Key&) const = default;
};

struct Hash {
  std::size_t operator()(const Key& key) const {
    const auto bits = reinterpret_cast<std::uintptr_t>(key.data) ^
                      static_cast<std::uintptr_t>(key.n * 31 + key.stride_n);
    return std::hash<std::uintptr_t>()(bits);
  }
};

struct Entry {
  Key key;
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> tensor;
  c10::weak_intrusive_ptr<c10::StorageImpl> storage;
  std::uint32_t version;
  const cpu::GemmKernel* kernel;
  at::Tensor packed;
};

/// What there is, the most recently used first.
class Cache {
 public:
  std::int64_t max_bytes() const { return max_bytes_.load(std::memory_order_relaxed); }

  void set_max_bytes(std::int64_t bytes) {
    const std::lock_guard lock(mutex_);
    max_bytes_ = bytes;
    drop_until(bytes);
  }

  PackedWeights info() {
    const std::lock_guard lock(mutex_);
    drop_dead();
    return {max_bytes(), bytes_, static_cast<std::int64_t>(entries_.size())};
  }

  at::Tensor find(const Key& key, std::uint32_t version, const cpu::GemmKernel* kernel) {
    const std::lock_guard lock(mutex_);
    const auto place = places_.find(key);
    if (place == places_.end()) return {};
    const auto entry = place->second;
    if (entry->version != version || entry->kernel != kernel) {
      drop(entry);
      return {};
    }
    entries_.splice(entries_.begin(), entries_, entry);
    return entry->packed;
  }

  void insert(Entry entry) {
    const std::lock_guard lock(mutex_);
    drop_dead();
    if (const auto place = places_.find(entry.key); place != places_.end()) drop(place->second);
    const std::int64_t bytes = entry.packed.numel();
    if (bytes > max_bytes()) return;  // it may have become less meanwhile
    drop_until(max_bytes() - bytes);
    bytes_ += bytes;
    entries_.push_front(std::move(entry));
    places_.emplace(entries_.front().key, entries_.begin());
  }

 private:
  using Entries = std::list<Entry>;

  void drop(Entries::iterator entry) {
    bytes_ -= entry->packed.numel();
    places_.erase(entry->key);
    entries_.erase(entry);
  }
  void drop_until(std::int64_t bytes) {
    while (bytes_ > bytes) drop(std::prev(entries_.end()));
  }
  void drop_dead() {
    for (auto next = entries_.begin(); next != entries_.end();) {
      const auto entry = next++;
      if (entry->tensor.expired() || entry->storage.expired()) drop(entry);
    }
  }

  std::atomic<std::int64_t> max_bytes_{0};
  std::mutex mutex_;
  Entries entries_;
  std::unordered_map<Key, Entries::iterator, Hash> places_;
  std::int64_t bytes_ = 0;
};

Cache& cache() {
  static Cache* const cache = new Cache;  // for calls in whatever threads are left at the end
  return *cache;
}

}  // namespace

PackedWeights packed_weights() { return cache().info(); }

void set_packed_weights(std::int64_t max_bytes) { cache().set_max_bytes(max_bytes); }

at::Tensor packed_weight(const at::Tensor& weight, std::int64_t rows) {
  const std::int64_t max_bytes = cache().max_bytes();
  // An inference tensor counts no changes.
  if (max_bytes == 0 || weight.is_inference() || !weight.is_cpu()) return {};
  if (!is_worth_packing(rows, dtype_of(weight))) return {};
  GemmDesc product;
  product.n = weight.size(0);
  product.k = weight.size(1);
  product.b_stride_n = weight.stride(0);
  product.b_stride_k = weight.stride(1);
  product.dtype = dtype_of(weight);
  product.whole_m = GemmDesc::kAnyBatch;
  product.precision = precision_for(product.dtype, static_cast<double>(product.whole_m));
  const cpu::Packing packing = cpu::packing_of(product);
  if (packing.bytes > max_bytes) return {};

  const at::TensorBase& counted = weight.is_view() ? weight._base() : weight;
  const Key key{counted.unsafeGetTensorImpl(),
                weight.storage().unsafeGetStorageImpl(),
                weight.const_data_ptr(),
                product.n,
                product.k,
                product.b_stride_n,
                product.b_stride_k,
                product.dtype};
  // Before the weight is read: a change made meanwhile is one for the next call to see.
  const auto version = static_cast<std::uint32_t>(weight._version());
  at::Tensor packed = cache().find(key, version, packing.kernel);
  if (packed.defined()) return packed;
  packed = empty_cpu({packing.bytes}, at::kByte);
  cpu::pack_b(packing, product, key.data, packed.mutable_data_ptr(), at_parallel_for());
  cache().insert({key, c10::weak_intrusive_ptr(counted.getIntrusivePtr()),
                  weight.storage().getWeakStorageImpl(), version, packing.kernel, packed});
  return packed;
}

}  // namespace neuron_ext

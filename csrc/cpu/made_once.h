// An object of the whole process, made by whoever needs it first.
#ifndef ELVA_CPU_MADE_ONCE_H_
#define ELVA_CPU_MADE_ONCE_H_

#include <atomic>

namespace elva {

// The object at `place`, which make() gives where there is none; never freed. Callers that come at
// once make one each, and all but one of them are deleted: unlike a static of a function, or what a
// lock guards, no caller waits for another. In the child of a fork that other would be gone, and
// the child would wait for ever.
template <class T, class Make>
T* made_once(std::atomic<T*>* place, const Make& make) {
  T* known = place->load(std::memory_order_acquire);
  if (known != nullptr) return known;
  T* const fresh = make();
  if (place->compare_exchange_strong(known, fresh, std::memory_order_acq_rel)) return fresh;
  delete fresh;
  return known;
}

}  // namespace elva
#endif  // ELVA_CPU_MADE_ONCE_H_

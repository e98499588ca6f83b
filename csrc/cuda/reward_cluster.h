// The grouped reward with each group in the shared memory of a cluster.
#ifndef ELVA_CUDA_REWARD_CLUSTER_H_
#define ELVA_CUDA_REWARD_CLUSTER_H_

#include "reward_gradient.h"

namespace elva {

// Which columns of a group's rows a block holds, and so the segments of their sums everywhere.
struct Split {
  int64_t columns;  // a multiple of 16 bytes; the last blocks have fewer, or none
  int blocks;       // 0: a group fits no cluster
};

// Of the group's size alone, not of the device or the layout.
template <class T>
Split split_of(int64_t candidates, int64_t dim);

// Where split_of has blocks. ELVA_UNSUPPORTED where the device has no clusters, or rows are not
// dense on 16 bytes.
template <class T>
ElvaStatus cluster_reward(const ElvaRewardArgs& args, const Split& split);

}  // namespace elva
#endif  // ELVA_CUDA_REWARD_CLUSTER_H_

// A tensor as a channelwise kernel sees it, in memory order: `groups` samples, each of which may have its own parameters, of
// `outer` rows of `channels` of `inner` neighbouring values.
#pragma once
#include <cstdint>

namespace ctk {

struct View {
  int64_t groups = 1, outer = 1, channels = 1, inner = 1;
  bool dense = true;    // false: the tensor must be copied first
  bool packed = false;  // rows of channels * inner values of x and of its factor alternate
  int64_t numel() const { return groups * outer * channels * inner; }
};

// Dimensions of a dense, non-overlapping tensor in memory order, outermost first; false if it is not one.
inline bool memory_order(const int64_t* sizes, const int64_t* strides, int64_t dim, int* order, int& used) {
  used = 0;
  for (int d = 0; d < dim; ++d) {
    if (sizes[d] == 1) continue;
    int at = used++;
    for (; at > 0 && strides[order[at - 1]] < strides[d]; --at) order[at] = order[at - 1];
    order[at] = d;
  }
  int64_t expected = 1;
  for (int i = used - 1; i >= 0; --i) {
    if (strides[order[i]] != expected) return false;
    expected *= sizes[order[i]];
  }
  return true;
}

// channel_dim < 0: one parameter for all. per_group: dimension 0 is the group.
inline View view_of(const int64_t* sizes, const int64_t* strides, int64_t dim, int64_t channel_dim, bool per_group) {
  View v;
  int order[64] = {}, used = 0;
  bool channel_seen = false;
  v.groups = per_group ? sizes[0] : 1;
  v.channels = channel_dim >= 0 ? sizes[channel_dim] : 1;
  for (int64_t d = 0; d < dim; ++d)
    if (sizes[d] == 0) return v.outer = 0, v;
  v.dense = memory_order(sizes, strides, dim, order, used);
  if (!v.dense) return v;
  if (per_group && sizes[0] != 1 && order[0] != 0) return v.dense = false, v;  // the group must be outermost
  for (int i = 0; i < used; ++i) {
    if (per_group && order[i] == 0) continue;
    if (order[i] == channel_dim) channel_seen = true;
    else (channel_seen || channel_dim < 0 ? v.inner : v.outer) *= sizes[order[i]];
  }
  if (!channel_seen) v.inner *= v.outer, v.outer = 1;  // one channel, or all share their parameters
  return v;
}

// The view of x in a contiguous tensor whose `channel_dim` holds the channels of x, then those of its factor. shared: all
// channels share their parameters.
inline View packed_view_of(const int64_t* sizes, const int64_t* strides, int64_t dim, int64_t channel_dim, bool shared, bool per_group) {
  View v = view_of(sizes, strides, dim, channel_dim, per_group);
  v.packed = true;
  v.channels /= 2;
  if (shared) v.inner *= v.channels, v.channels = v.channels ? 1 : 0;
  return v;
}

}  // namespace ctk

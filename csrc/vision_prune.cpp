#include "vision_prune.cuh"

namespace foveate {

void select_topk(const TopkArguments& arguments, OnHost) {
    const std::int64_t spans = arguments.spans.count;
    select_topk(arguments, HostRun{spans ? arguments.total / spans : 0});
}

void select_maxmin(const MaxminArguments& arguments, OnHost) {
    select_maxmin(arguments, HostRun{CosineTile::kTile * arguments.dim});
}

void copy_rows(const CopyArguments& arguments, OnHost) {
    copy_rows(arguments, HostRun{arguments.planes[0].row_bytes});
}

}  // namespace foveate

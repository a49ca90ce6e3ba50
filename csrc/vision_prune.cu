#include "common/run.cuh"
#include "vision_prune.cuh"
#include "vision_prune_maxmin.cuh"

namespace foveate {

void select_topk(const TopkArguments& arguments, OnDevice device) {
    select_topk(arguments, DeviceRun{"select_topk", device.stream});
}

void select_maxmin(const MaxminArguments& arguments, const std::vector<LongSpan>& spans, OnDevice device) {
    select_maxmin(arguments, spans, DeviceRun{"select_maxmin", device.stream});
}

void copy_rows(const CopyArguments& arguments, OnDevice device) {
    copy_rows(arguments, DeviceRun{"copy_rows", device.stream});
}

}  // namespace foveate

#include "pages.h"

#include <numeric>
#include <string>

#include "common/check.h"

namespace foveate {
namespace {

constexpr PageId kWordBits = 64;
constexpr PageId kNoRun = -1;

// Zeros below the lowest set bit; word must not be 0, for which the builtin is undefined.
PageId count_low_zeros(std::uint64_t word) {
    return __builtin_ctzll(word);
}

PageId count_high_ones(std::uint64_t word) {
    return ~word == 0 ? kWordBits : __builtin_clzll(~word);
}

PageId count_low_ones(std::uint64_t word) {
    return ~word == 0 ? kWordBits : __builtin_ctzll(~word);
}

// Bits at which a run of n set bits starts inside the word, 1 <= n <= 64.
std::uint64_t run_starts(std::uint64_t word, PageId n) {
    for (PageId have = 1; have < n && word != 0;) {
        const PageId shift = have < n - have ? have : n - have;  // runs of `have` double, the last step less
        word &= word >> shift;
        have += shift;
    }
    return word;
}

std::invalid_argument bad_page(const std::string& expected, PageId got, const char* argument) {
    return bad_value(expected, std::to_string(got), argument);
}

}  // namespace

OutOfPages::OutOfPages(PageId wanted, PageId num_free)
    : std::runtime_error("expected at least " + std::to_string(wanted) + " free pages, got " +
                         std::to_string(num_free)) {}

PagePool::PagePool(PageId num_pages) : num_pages_(num_pages), num_free_(num_pages) {
    if (num_pages < 0) throw bad_page("num_pages >= 0", num_pages, "num_pages");
    free_.assign(static_cast<std::size_t>(num_pages / kWordBits), ~std::uint64_t{0});
    const PageId rest = num_pages % kWordBits;
    if (rest != 0) free_.push_back((std::uint64_t{1} << rest) - 1);
}

std::vector<PageId> PagePool::allocate(PageId n) {
    if (n < 0) throw bad_page("n >= 0", n, "n");
    if (n > num_free_) throw OutOfPages(n, num_free_);
    if (n == 0) return {};
    std::vector<PageId> pages;
    const PageId start = find_run(n);
    if (start == kNoRun) {
        pages = lowest_free(n);
    } else {
        pages.resize(static_cast<std::size_t>(n));
        std::iota(pages.begin(), pages.end(), start);
    }
    for (const PageId page : pages) flip(page);
    num_free_ -= n;
    return pages;
}

void PagePool::free(const std::vector<PageId>& pages) {
    for (const PageId page : pages) check_range(page);
    for (std::size_t i = 0; i < pages.size(); ++i) {
        if (!is_free(pages[i])) {
            flip(pages[i]);
            continue;
        }
        // A page given twice shows up here as free: take back what this call has marked, then name the cause.
        for (std::size_t j = 0; j < i; ++j) flip(pages[j]);
        if (is_free(pages[i])) throw bad_page("pages in use", pages[i], "pages: already free");
        throw bad_page("each page once", pages[i], "pages: given twice");
    }
    num_free_ += static_cast<PageId>(pages.size());
}

bool PagePool::is_used(PageId page) const {
    check_range(page);
    return !is_free(page);
}

// First page of the lowest run of n free pages, or kNoRun.
PageId PagePool::find_run(PageId n) const {
    PageId before = 0;  // free pages right below the word, fewer than n, else the run was found
    for (std::size_t w = 0; w < free_.size(); ++w) {
        const std::uint64_t word = free_[w];
        const PageId base = static_cast<PageId>(w) * kWordBits;
        const PageId low = count_low_ones(word);
        if (before + low >= n) return base - before;
        if (n <= kWordBits) {
            const std::uint64_t starts = run_starts(word, n);
            if (starts != 0) return base + count_low_zeros(starts);
        }
        before = low == kWordBits ? before + kWordBits : count_high_ones(word);
    }
    return kNoRun;
}

std::vector<PageId> PagePool::lowest_free(PageId n) const {
    std::vector<PageId> pages;
    pages.reserve(static_cast<std::size_t>(n));
    for (std::size_t w = 0; pages.size() < static_cast<std::size_t>(n); ++w) {
        std::uint64_t word = free_[w];
        for (; word != 0 && pages.size() < static_cast<std::size_t>(n); word &= word - 1) {
            pages.push_back(static_cast<PageId>(w) * kWordBits + count_low_zeros(word));
        }
    }
    return pages;
}

void PagePool::check_range(PageId page) const {
    if (page >= 0 && page < num_pages_) return;
    throw bad_page("0 <= page < " + std::to_string(num_pages_), page, "page");
}

bool PagePool::is_free(PageId page) const {
    return (free_[static_cast<std::size_t>(page / kWordBits)] >> (page % kWordBits)) & 1;
}

void PagePool::flip(PageId page) {
    free_[static_cast<std::size_t>(page / kWordBits)] ^= std::uint64_t{1} << (page % kWordBits);
}

}  // namespace foveate

// Random traces of the page pool against a plain model, to be built with sanitizers.
// PLANT_BUG shows that such a build would notice: 1 reads past a buffer, 2 overflows an int, 3 loses a page.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <vector>

#include "pages.h"

#ifndef PLANT_BUG
#define PLANT_BUG 0
#endif

using foveate::PageId;
using foveate::PagePool;

namespace {

void check(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "trace broke: %s\n", what);
    std::exit(3);
}

class Trace {
  public:
    Trace(PageId num_pages, unsigned seed) : pool_(num_pages), random_(seed) {
        for (PageId page = 0; page < num_pages; ++page) free_.insert(page);
    }

    void step() {
        const int kind = below(5);
        if (kind < 2) allocate(below(static_cast<int>(free_.size()) + 2));
        if (kind == 2 || kind == 3) give_back(below(static_cast<int>(used_.size()) + 1));
        if (kind == 4) give_back_badly();
        compare();
    }

  private:
    int below(int bound) { return static_cast<int>(random_() % static_cast<unsigned>(bound)); }

    void allocate(PageId n) {
        std::vector<PageId> pages;
        try {
            pages = pool_.allocate(n);
        } catch (const foveate::OutOfPages&) {
            check(n > static_cast<PageId>(free_.size()), "refused although enough pages are free");
            return;
        }
        check(static_cast<PageId>(pages.size()) == n, "another number of pages than asked for");
        check(std::is_sorted(pages.begin(), pages.end()), "pages ascend");
        for (const PageId page : pages) {
            check(free_.erase(page) == 1, "a page in use was handed out");
            used_.push_back(page);
        }
        if (PLANT_BUG == 1 && n > 0) sink_ = pages.data()[n];
        if (PLANT_BUG == 2 && n > 0) sink_ = 2147483647 - pages[0] + pages.back() + n;
        if (PLANT_BUG == 3 && n > 0) used_.pop_back();
    }

    void give_back(int count) {
        std::shuffle(used_.begin(), used_.end(), random_);
        std::vector<PageId> pages(used_.end() - count, used_.end());
        used_.resize(used_.size() - static_cast<std::size_t>(count));
        pool_.free(pages);
        free_.insert(pages.begin(), pages.end());
    }

    // All pages in use and one that is out of range, free, or given twice.
    void give_back_badly() {
        std::vector<PageId> candidates = {-1, pool_.num_pages(), 2147483647, -2147483647 - 1};
        if (!free_.empty()) candidates.push_back(*free_.begin());
        if (!used_.empty()) candidates.push_back(used_.front());
        std::vector<PageId> pages = used_;
        pages.insert(pages.begin() + below(static_cast<int>(pages.size()) + 1),
                     candidates[static_cast<std::size_t>(below(static_cast<int>(candidates.size())))]);
        try {
            pool_.free(pages);
        } catch (const std::invalid_argument&) {
            return;
        }
        check(false, "a bad page was accepted");
    }

    void compare() {
        check(pool_.num_free() == static_cast<PageId>(free_.size()), "free pages are counted");
        check(pool_.num_used() == static_cast<PageId>(used_.size()), "used pages are counted");
        for (PageId page = 0; page < pool_.num_pages(); ++page) {
            check(pool_.is_used(page) == (free_.count(page) == 0), "each page is where the model has it");
        }
    }

    PagePool pool_;
    std::mt19937 random_;
    std::set<PageId> free_;
    std::vector<PageId> used_;
    volatile int sink_ = 0;
};

}  // namespace

int main() {
    unsigned seed = 0;
    for (const PageId num_pages : {0, 1, 2, 63, 64, 65, 127, 128, 129, 1000}) {
        for (int repeat = 0; repeat < 4; ++repeat) {
            Trace trace(num_pages, seed++);
            for (int i = 0; i < 300; ++i) trace.step();
        }
    }
    std::puts("traces agree");
    return 0;
}

#include "cores.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif

// below these shares of the fastest one a core is slow
static const double LEAST_CAPACITY = 0.5;
static const double LEAST_CLOCK    = 0.7;

// ---- files of the system -------------------------------------------------------------------------------------------------

// The text of a file without the blanks around it; "" where it cannot be read.
static std::string text_of(const std::string & path) {
    std::string text;
    FILE * file = fopen(path.c_str(), "rb");
    if (!file) {
        return text;
    }
    char part[4096];
    for (size_t n; (n = fread(part, 1, sizeof(part), file)) > 0;) {
        text.append(part, n);
    }
    fclose(file);
    const size_t first = text.find_first_not_of(" \t\n"), last = text.find_last_not_of(" \t\n");
    return first == std::string::npos ? "" : text.substr(first, last - first + 1);
}

// A number of digits alone, or -1: no function of stdio or iostream that looks at the program's locale.
static double number_of(const std::string & text) {
    if (text.empty() || text.size() > 18 || text.find_first_not_of("0123456789") != std::string::npos) {
        return -1;
    }
    return (double) atoll(text.c_str());
}

static std::vector<std::string> split(const std::string & text, char at) {
    std::vector<std::string> parts;
    size_t begin = 0;
    for (size_t end; (end = text.find(at, begin)) != std::string::npos; begin = end + 1) {
        parts.push_back(text.substr(begin, end - begin));
    }
    parts.push_back(text.substr(begin));
    return parts;
}

// A list as the kernel writes it, e.g. "0-3,8".
static std::set<int> list_of(const std::string & text) {
    std::set<int> found;
    for (const std::string & item : split(text, ',')) {
        const size_t dash = item.find('-');
        const double first = number_of(item.substr(0, dash)), last = dash == std::string::npos ? first : number_of(item.substr(dash + 1));
        if (first < 0 || last < 0 || last > 1e6) {
            return {};
        }
        for (int cpu = (int) first; cpu <= (int) last; ++cpu) {
            found.insert(cpu);
        }
    }
    return found;
}

// ---- cores ---------------------------------------------------------------------------------------------------------------

static std::string cpu_file(const std::string & root, int cpu, const std::string & name) {
    return text_of(root + "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/" + name);
}

// Those of at least a share of the largest number that a file says; all, where not every CPU has one.
static std::set<int> fastest(const std::string & root, const std::set<int> & cpus, const std::string & file, double least) {
    std::vector<std::pair<int, double>> speeds;
    double most = 0;
    for (int cpu : cpus) {
        speeds.push_back({ cpu, number_of(cpu_file(root, cpu, file)) });
        if (speeds.back().second < 0) {
            return cpus;
        }
        most = std::max(most, speeds.back().second);
    }
    std::set<int> found;
    for (const auto & [cpu, speed] : speeds) {
        if (speed >= least*most) {
            found.insert(cpu);
        }
    }
    return found;
}

static std::set<int> fast_cpus(const std::string & root, const std::set<int> & cpus) {
    std::set<int> performance;
    for (int cpu : list_of(text_of(root + "/sys/devices/cpu_core/cpus"))) {
        if (cpus.count(cpu)) {
            performance.insert(cpu);
        }
    }
    if (!performance.empty() && performance.size() < cpus.size()) {
        return performance;
    }
    const auto able = fastest(root, cpus, "cpu_capacity", LEAST_CAPACITY);
    return able.size() < cpus.size() ? able : fastest(root, cpus, "cpufreq/cpuinfo_max_freq", LEAST_CLOCK);
}

static size_t cores_of(const std::string & root, const std::set<int> & cpus) {
    std::set<std::string> cores;
    for (int cpu : cpus) {
        const std::string siblings = cpu_file(root, cpu, "topology/thread_siblings_list");
        cores.insert(siblings.empty() ? std::to_string(cpu) : siblings);
    }
    return cores.size();
}

// ---- the quota of control groups -----------------------------------------------------------------------------------------

namespace {

struct mount {
    bool v2;
    std::string top, folder; // the group that lies there, and where
};

} // namespace

// The hierarchies that limit CPU time, or may.
static std::vector<mount> cpu_mounts(const std::string & root) {
    std::vector<mount> found;
    for (const std::string & line : split(text_of(root + "/proc/self/mountinfo"), '\n')) {
        const size_t middle = line.find(" - ");
        if (middle == std::string::npos) {
            continue;
        }
        const auto place = split(line.substr(0, middle), ' '), kind = split(line.substr(middle + 3), ' ');
        if (place.size() < 5 || kind.size() < 3) {
            continue;
        }
        const auto options = split(kind[2], ',');
        const bool v2 = kind[0] == "cgroup2";
        if (v2 || (kind[0] == "cgroup" && std::find(options.begin(), options.end(), "cpu") != options.end())) {
            found.push_back({ v2, place[3], place[4] });
        }
    }
    if (found.empty()) {
        found = { { true, "/", "/sys/fs/cgroup" }, { false, "/", "/sys/fs/cgroup/cpu" } };
    }
    return found;
}

// The path of this process's group.
static std::string own_group(const std::string & root, bool v2) {
    for (const std::string & line : split(text_of(root + "/proc/self/cgroup"), '\n')) {
        const auto parts = split(line, ':');
        if (parts.size() < 3) {
            continue;
        }
        const auto controllers = split(parts[1], ',');
        if (v2 ? parts[1].empty() : std::find(controllers.begin(), controllers.end(), "cpu") != controllers.end()) {
            return line.substr(parts[0].size() + parts[1].size() + 2);
        }
    }
    return "/";
}

// CPUs' worth of time that one group may have, or 0: no limit.
static double quota_of(const std::string & folder) {
    const std::string both = text_of(folder + "/cpu.max");
    const size_t blank = both.find(' ');
    const double quota  = number_of(blank == std::string::npos ? text_of(folder + "/cpu.cfs_quota_us")  : both.substr(0, blank));
    const double period = number_of(blank == std::string::npos ? text_of(folder + "/cpu.cfs_period_us") : both.substr(blank + 1));
    return quota > 0 && period > 0 ? quota/period : 0;
}

// The least of the groups from a mount's down to this process's, or 0.
static double cpu_quota(const std::string & root) {
    double least = 0;
    for (const mount & m : cpu_mounts(root)) {
        const std::string top = m.top == "/" ? "" : m.top, group = own_group(root, m.v2) + "/";
        std::string folder = root + m.folder;
        std::vector<std::string> names = { "" };
        if (group.compare(0, top.size() + 1, top + "/") == 0) {
            const auto below = split(group.substr(top.size()), '/');
            if (std::find(below.begin(), below.end(), "..") == below.end()) {
                names.insert(names.end(), below.begin(), below.end());
            }
        }
        for (const std::string & name : names) {
            folder += name.empty() ? "" : "/" + name;
            const double quota = quota_of(folder);
            least = quota > 0 && (least == 0 || quota < least) ? quota : least;
        }
    }
    return least;
}

// ---- all of it -----------------------------------------------------------------------------------------------------------

int32_t choose_threads(const std::string & root, const std::set<int> & cpus) {
    int32_t n = (int32_t) cores_of(root, fast_cpus(root, cpus));
    const double quota = cpu_quota(root);
    if (quota > 0 && quota < n) {
        n = (int32_t) quota;
    }
    return std::max(1, n);
}

std::set<int> usable_cpus() {
    std::set<int> cpus;
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) {
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (CPU_ISSET(cpu, &set)) {
                cpus.insert(cpu);
            }
        }
        return cpus;
    }
#endif
    for (unsigned cpu = 0; cpu < std::max(1u, std::thread::hardware_concurrency()); ++cpu) {
        cpus.insert((int) cpu);
    }
    return cpus;
}

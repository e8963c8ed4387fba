/* A command that may run for so long: timeout(1), for all that is in the command's session. */
#define _GNU_SOURCE
#include "guest.h"

#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define TIMED_OUT 124
#define LOOK_MS 50

static pid_t limited;

static void pass_on(int number) {
    kill(limited, number);
}

static unsigned long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (unsigned long)now.tv_sec * 1000 + (unsigned long)now.tv_nsec / 1000000;
}

/* Signal every other process of this session; how many there are. A zombie is not one. */
static int signal_session(int number) {
    DIR *processes = opendir("/proc");
    struct dirent *entry;
    int count = 0;
    while (processes && (entry = readdir(processes))) {
        pid_t pid = atoi(entry->d_name);
        siginfo_t ended = {0};
        if (pid <= 0 || pid == getpid() || getsid(pid) != getsid(0))
            continue;
        if (pid == limited && !waitid(P_PID, (id_t)pid, &ended, WEXITED | WNOHANG | WNOWAIT) && ended.si_pid)
            continue;
        count += !kill(pid, number);
    }
    if (processes)
        closedir(processes);
    return count;
}

static int exit_code(int status) {
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

static int wait_for_end(void) {
    int status = 0;
    while (waitpid(limited, &status, 0) < 0 && errno == EINTR)
        ;
    return exit_code(status);
}

static void end_session(unsigned long grace_ms) {
    unsigned long deadline = now_ms() + grace_ms;
    signal_session(SIGTERM);
    signal_session(SIGCONT); /* what is stopped does not end */
    while (signal_session(0) && now_ms() < deadline)
        poll(NULL, 0, LOOK_MS);
    signal_session(SIGKILL);
}

/* Keys of the terminal are for the command; what the far end sends is passed on to it. */
static const int keys[] = {SIGINT, SIGQUIT, SIGTSTP, SIGTTIN, SIGTTOU}, passed[] = {SIGHUP, SIGTERM, SIGUSR1, SIGUSR2};

void limit_time(unsigned long timeout_ms, unsigned long grace_ms) {
    limited = fork();
    if (limited <= 0)
        return;
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        signal(keys[i], SIG_IGN);
    for (size_t i = 0; i < sizeof passed / sizeof *passed; i++)
        signal(passed[i], pass_on);
    unsigned long deadline = now_ms() + timeout_ms, now;
    struct pollfd end = {.fd = (int)syscall(SYS_pidfd_open, limited, 0), .events = POLLIN};
    while ((now = now_ms()) < deadline)
        if (poll(&end, 1, deadline - now > 1000000 ? 1000000 : (int)(deadline - now)) > 0)
            _exit(wait_for_end());
    end_session(grace_ms);
    wait_for_end();
    _exit(TIMED_OUT);
}

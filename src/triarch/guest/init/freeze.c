/* Requests `f:SECONDS` and `t:SECONDS` of session.c: hold the machine's filesystems still, set its clock. */
#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#define MAX_FILESYSTEMS 64

static int held[MAX_FILESYSTEMS], held_count;

/* Mounted once more, here alone: the same superblock, wherever the machine has it. */
static int open_filesystem(unsigned major, unsigned minor) {
    char node[] = "/freeze.node", place[] = "/freeze";
    int root = -1;
    mkdir(place, 0700);
    unlink(node);
    if (!mknod(node, S_IFBLK | 0600, makedev(major, minor)) && !mount(node, place, "ext4", MS_NOATIME, NULL)) {
        root = open(place, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
        umount2(place, MNT_DETACH);
    }
    unlink(node);
    return root;
}

static bool add(unsigned major, unsigned minor) {
    int root = held_count < MAX_FILESYSTEMS ? open_filesystem(major, minor) : -1;
    if (root >= 0)
        held[held_count++] = root;
    return root >= 0;
}

/* The delta, whose mount is hidden, and every ext4 that the machine has mounted from a disk: its volumes. */
static bool find_filesystems(void) {
    unsigned major, minor, own_major, own_minor;
    char *delta = read_file(DELTA_FILE, NULL), *mounts = read_file("/proc/1/mountinfo", NULL);
    if (!delta || sscanf(delta, "%u:%u", &own_major, &own_minor) != 2 || !add(own_major, own_minor))
        return false;
    for (char *line = mounts ? strtok(mounts, "\n") : NULL; line; line = strtok(NULL, "\n")) {
        char *kind = strstr(line, " - ");
        if (!kind || strncmp(kind, " - ext4 ", 8) || sscanf(line, "%*s %*s %u:%u", &major, &minor) != 2)
            continue;
        if (major && (major != own_major || minor != own_minor))
            add(major, minor);
    }
    return true;
}

static bool freeze_all(int *frozen) {
    for (*frozen = 0; *frozen < held_count; ++*frozen)
        /* EBUSY: two mounts of one filesystem, which is frozen by now. */
        if (ioctl(held[*frozen], FIFREEZE, 0) && errno != EBUSY)
            return false;
    return true;
}

static void say_word(const char *word) {
    if (write(1, word, strlen(word)) < 0)
        errno = 0; /* who asked is gone, and its end will thaw */
}

/* Until standard input ends, or nothing came for `seconds`. Whoever asked may be killed: that ends the input. */
static void wait_for_end(int seconds) {
    struct pollfd input = {.fd = 0, .events = POLLIN};
    char lease[64];
    while (poll(&input, 1, seconds * 1000) > 0)
        if (read(0, lease, sizeof lease) <= 0)
            return;
}

int freeze_machine(int seconds) {
    int frozen;
    static const int ignored[] = {SIGHUP, SIGTERM, SIGINT, SIGPIPE};
    for (size_t i = 0; i < sizeof ignored / sizeof *ignored; i++)
        signal(ignored[i], SIG_IGN);
    if (unshare(CLONE_NEWNS) || !find_filesystems()) {
        say_word("no filesystem\n");
        return 1;
    }
    for (int i = 0; i < held_count; i++)
        syncfs(held[i]); /* what is written out before need not be while everything waits */
    say_word("freezing\n");
    bool whole = freeze_all(&frozen);
    say_word(whole ? "frozen\n" : "refused\n");
    if (whole)
        wait_for_end(seconds);
    while (frozen--)
        ioctl(held[frozen], FITHAW, 0);
    say_word("thawed\n");
    return !whole;
}

int set_clock(const char *seconds) {
    char *fraction;
    struct timespec now = {.tv_sec = strtoll(seconds, &fraction, 10)};
    if (*fraction == '.')
        now.tv_nsec = strtol(fraction + 1, NULL, 10);
    return clock_settime(CLOCK_REALTIME, &now) != 0;
}

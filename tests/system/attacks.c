/* Tries one thing that a container must not be able to do; prints what happened. Exit 0: it worked, 1: refused. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

static long number(const char *text) { return strtol(text, NULL, 0); }

static long attack(int argc, char **argv) {
    const char *what = argv[1];
    if (!strcmp(what, "syscall"))
        return syscall(number(argv[2]), argc > 3 ? number(argv[3]) : 0, argc > 4 ? number(argv[4]) : 0, 0, 0, 0, 0);
    if (!strcmp(what, "write")) {
        int fd = open(argv[2], O_WRONLY);
        return fd < 0 ? fd : write(fd, argv[3], strlen(argv[3]));
    }
    if (!strcmp(what, "read")) {
        char byte;
        int fd = open(argv[2], O_RDONLY);
        return fd < 0 ? fd : read(fd, &byte, 1) == 1 ? 0 : -1;
    }
    if (!strcmp(what, "device")) {
        unlink("/root/device");
        if (mknod("/root/device", number(argv[2]) | 0600, makedev(number(argv[3]), number(argv[4]))))
            return -1;
        return open("/root/device", O_RDONLY);
    }
    if (!strcmp(what, "mount"))
        return mount(argv[2], argv[3], argv[4], number(argv[5]), argc > 6 ? argv[6] : NULL);
    if (!strcmp(what, "setns")) {
        int fd = open(argv[2], O_RDONLY);
        return fd < 0 ? fd : setns(fd, 0);
    }
    if (!strcmp(what, "setuid"))
        return setresuid(number(argv[2]), number(argv[2]), number(argv[2]));
    if (!strcmp(what, "core-limit")) {
        struct rlimit limit = {1 << 26, 1 << 26};
        return setrlimit(RLIMIT_NOFILE, &limit);
    }
    if (!strcmp(what, "handle")) {
        struct { struct file_handle head; unsigned char bytes[8]; } handle = {{8, 1}, {2}};
        int fd = open("/", O_RDONLY);
        return open_by_handle_at(fd, &handle.head, O_RDONLY);
    }
    if (!strcmp(what, "loop"))
        return open("/dev/loop-control", O_RDWR);
    if (!strcmp(what, "clock")) {
        struct timespec now = {0, 0};
        return syscall(SYS_clock_settime, 0, &now);
    }
    fprintf(stderr, "unknown attack %s\n", what);
    exit(2);
}

int main(int argc, char **argv) {
    errno = 0;
    if (attack(argc, argv) >= 0) {
        printf("worked\n");
        return 0;
    }
    printf("refused: %s\n", strerror(errno));
    return 1;
}

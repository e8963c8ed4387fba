/* Login shell of the SSH server: enters the machine and executes one request.
 *
 * guest/agent.py sends one of these as the command:
 *   x:REQUEST   execute; REQUEST is a row of netstrings (`length:bytes`): user, folder (empty: the usual one), 1 for a login
 *               shell, timeout and grace in milliseconds (0: none), how many words the command has, the words, then the
 *               environment's NAME=value
 *   p:ID        keep standard input as request ID (for requests longer than an SSH command may be)
 *   r:ID        execute request ID
 *   f:SECONDS   hold the filesystems still (freeze.c)
 *   t:SECONDS   set the clock
 *   s:files     serve the machine's files (../files)
 * and the SSH server itself runs its sftp-server through here.
 */
#define _GNU_SOURCE
#include "files.h"
#include "guest.h"
#include "protocol.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define NOT_EXECUTABLE 126
#define NOT_FOUND 127
#define MAX_WORDS 65536

static int refuse(const char *what) {
    fprintf(stderr, "triarch: %s: %s\n", what, strerror(errno));
    return errno == ENOENT ? NOT_FOUND : NOT_EXECUTABLE;
}

/* The machine's root is this one until PID 1 has switched. */
static void wait_for_machine(void) {
    struct stat here, there;
    while (!stat("/", &here) && !stat("/machine/", &there) && here.st_dev == there.st_dev && here.st_ino == there.st_ino)
        usleep(10000);
}

static int enter_machine(void) {
    wait_for_machine();
    return chroot("/machine") || chdir("/");
}

/* Cut the next netstring off `*at` and end it with a NUL. NULL at the end or where it is malformed. */
char *next_word(char **at, char *end) {
    char *colon;
    size_t length = strtoul(*at, &colon, 10);
    if (*at >= end || *colon != ':' || length > (size_t)(end - colon - 1))
        return NULL;
    char *word = colon + 1;
    memmove(colon, word, length); /* the NUL takes the place of the colon */
    colon[length] = 0;
    *at = word + length;
    return colon;
}

/* Signals come from the far end through the server: none may outlive it unnoticed. */
static int become(const struct account *account, bool limited) {
    if (setgroups(account->group_count, account->groups) || setgid(account->gid) || setuid(account->uid))
        return refuse("cannot become that user");
    prctl(PR_SET_PDEATHSIG, limited ? SIGKILL : SIGHUP);
    return 0;
}

static void set_environment(const struct account *account, char *variables, char *end) {
    setenv("PATH", DEFAULT_PATH, 1);
    setenv("HOME", account->home, 1);
    setenv("SHELL", account->shell, 1);
    if (account->name) {
        setenv("USER", account->name, 1);
        setenv("LOGNAME", account->name, 1);
    }
    for (char *variable; (variable = next_word(&variables, end));)
        putenv(variable);
}

static int execute_login(const struct account *account) {
    const char *shell = access(account->shell, X_OK) ? FALLBACK_SHELL : account->shell;
    char name[300];
    snprintf(name, sizeof name, "-%s", strrchr(shell, '/') + 1);
    setenv("SHELL", shell, 1);
    execl(shell, name, (char *)NULL);
    return refuse(shell);
}

enum head { USER, FOLDER, LOGIN, TIMEOUT, GRACE, COUNT, HEAD };

static int execute(char *request, size_t size) {
    char *end = request + size, *words[HEAD], **argv;
    for (int i = 0; i < HEAD; i++)
        if (!(words[i] = next_word(&request, end)))
            return (errno = EINVAL), refuse("malformed request");
    unsigned long timeout_ms = strtoul(words[TIMEOUT], NULL, 10), count = strtoul(words[COUNT], NULL, 10);
    bool login = *words[LOGIN] == '1';
    if ((count < 1 && !login) || count > MAX_WORDS || !(argv = calloc(count + 1, sizeof *argv)))
        return (errno = EINVAL), refuse("malformed request");
    for (unsigned long i = 0; i < count; i++)
        if (!(argv[i] = next_word(&request, end)))
            return (errno = EINVAL), refuse("malformed request");
    char *terminal = getenv("TERM");
    clearenv();
    if (terminal)
        setenv("TERM", terminal, 1);
    setsid(); /* without a terminal, the server's own session; with one, it has made one already */
    if (timeout_ms)
        limit_time(timeout_ms, strtoul(words[GRACE], NULL, 10));
    if (enter_machine())
        return refuse("cannot enter the machine");
    struct account account;
    if (!find_account(words[USER], &account))
        return NOT_EXECUTABLE;
    set_environment(&account, request, end);
    int refused = become(&account, timeout_ms > 0);
    if (refused)
        return refused;
    if (*words[FOLDER] && chdir(words[FOLDER]))
        return refuse(words[FOLDER]);
    if (!login)
        return execvp(argv[0], argv), refuse(argv[0]);
    if (!*words[FOLDER] && chdir(account.home) && chdir("/"))
        return refuse("/");
    return execute_login(&account);
}

static int keep_request(const char *path) {
    size_t size;
    char *request = read_file("/proc/self/fd/0", &size);
    mkdir("/requests", 0700);
    return request && size <= MAX_REQUEST_BYTES && write_file(path, request, size, 0600) ? 0 : refuse("cannot keep request");
}

static int execute_kept(const char *path) {
    size_t size;
    char *request = read_file(path, &size);
    unlink(path);
    return request ? execute(request, size) : refuse("no such request");
}

/* The template need not have an sftp-server: ours runs inside the machine, reached through a folder held open. */
static int serve_sftp(void) {
    enum { HIDDEN = 200 };
    if (dup2(open("/", O_PATH | O_DIRECTORY), HIDDEN) < 0 || enter_machine())
        return refuse("cannot enter the machine");
    execl("/proc/self/fd/200/lib64/ld-linux-x86-64.so.2", "sftp-server", "--inhibit-cache", "--library-path",
          "/proc/self/fd/200/lib", "/proc/self/fd/200/bin/sftp-server", (char *)NULL);
    return refuse("sftp-server");
}

int login_shell(int argc, char **argv) {
    if (argc != 3 || strcmp(argv[1], "-c") || strlen(argv[2]) < 3) {
        fprintf(stderr, "triarch: this is the guest's init; it is not for people\n");
        return NOT_EXECUTABLE;
    }
    char path[64], *rest = argv[2] + 2;
    snprintf(path, sizeof path, "/requests/%lu", strtoul(rest, NULL, 10));
    if (!strncmp(argv[2], "x:", 2))
        return execute(rest, strlen(rest));
    if (!strncmp(argv[2], "p:", 2))
        return keep_request(path);
    if (!strncmp(argv[2], "r:", 2))
        return execute_kept(path);
    if (!strncmp(argv[2], "f:", 2))
        return freeze_machine(atoi(rest));
    if (!strncmp(argv[2], "t:", 2))
        return set_clock(rest);
    if (!strncmp(argv[2], "s:", 2))
        enter_machine() ? (void)refuse("cannot enter the machine") : serve_files(0, 1);
    if (!strncmp(argv[2], "d:", 2))
        return wait_for_machine(), serve_device(rest, strlen(rest));
    return strstr(argv[2], "sftp-server") ? serve_sftp() : NOT_EXECUTABLE;
}

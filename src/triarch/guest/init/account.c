/* Users of the machine, as its own passwd(5) and group(5) tell of them: the C side of model/account.py.
 * What those files say is hostile input: a line that is not whole counts for nothing. */
#define _GNU_SOURCE
#include "guest.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_FILE_BYTES (1 << 20)
#define MAX_ID 4294967294ULL /* the last number means "no change" to the kernel */
#define PASSWD_FIELDS 7
#define GROUP_FIELDS 4

static bool is_number(const char *word) {
    size_t length = strlen(word);
    return length > 0 && length <= 20 && strspn(word, "0123456789") == length;
}

static bool to_id(const char *word, unsigned *id) {
    unsigned long long value = strtoull(word, NULL, 10);
    *id = (unsigned)value;
    return is_number(word) && value <= MAX_ID;
}

/* The beginning of a regular file, empty where there is none: a pipe in its place must not hold anybody up. */
static char *read_some(const char *path, char **end) {
    char *data = calloc(1, MAX_FILE_BYTES + 1);
    int file = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    struct stat status;
    size_t used = 0;
    ssize_t got;
    if (data && file >= 0 && !fstat(file, &status) && S_ISREG(status.st_mode))
        while ((got = read(file, data + used, MAX_FILE_BYTES - used)) > 0)
            used += (size_t)got;
    if (file >= 0)
        close(file);
    *end = data ? data + used : data;
    return data;
}

/* Cut the next whole line of `count` fields off `*at`. False at the end. */
static bool next_line(char **at, char *end, char **fields, int count) {
    while (*at && *at < end) {
        char *line = *at, *stop = memchr(line, '\n', (size_t)(end - line)) ?: end;
        *at = stop + 1;
        *stop = 0;
        if (strlen(line) != (size_t)(stop - line))
            continue; /* a NUL in it */
        int found = 0;
        for (char *field; (field = strsep(&line, ":")); found++)
            if (found < count)
                fields[found] = field;
        if (found == count && *fields[0])
            return true;
    }
    return false;
}

static bool find_user(const char *wanted, struct account *account) {
    char *end, *at = read_some("/etc/passwd", &end), *fields[PASSWD_FIELDS];
    unsigned number = 0, uid, gid;
    bool numeric = to_id(wanted, &number);
    while (next_line(&at, end, fields, PASSWD_FIELDS)) {
        if (!to_id(fields[2], &uid) || !to_id(fields[3], &gid) || (numeric ? uid != number : strcmp(fields[0], wanted)))
            continue;
        *account = (struct account){.uid = uid, .gid = gid, .name = fields[0], .home = "/", .shell = FALLBACK_SHELL};
        if (*fields[5] == '/')
            account->home = fields[5];
        if (*fields[6] == '/')
            account->shell = fields[6];
        return true;
    }
    *account = (struct account){.uid = number, .gid = number, .home = number ? "/" : "/root", .shell = FALLBACK_SHELL};
    return numeric;
}

static bool find_group(const char *wanted, unsigned *gid) {
    char *end, *at = read_some("/etc/group", &end), *fields[GROUP_FIELDS];
    if (to_id(wanted, gid))
        return true;
    while (next_line(&at, end, fields, GROUP_FIELDS))
        if (!strcmp(fields[0], wanted) && to_id(fields[2], gid))
            return true;
    return false;
}

static bool has_member(char *members, const char *name) {
    for (char *member; (member = strsep(&members, ","));)
        if (!strcmp(member, name))
            return true;
    return false;
}

static void add_supplementary(struct account *account) {
    char *end, *at = read_some("/etc/group", &end), *fields[GROUP_FIELDS];
    unsigned gid;
    account->groups = calloc(MAX_GROUPS, sizeof *account->groups);
    while (account->groups && account->group_count < MAX_GROUPS && next_line(&at, end, fields, GROUP_FIELDS))
        if (to_id(fields[2], &gid) && gid != account->gid && has_member(fields[3], account->name))
            account->groups[account->group_count++] = gid;
}

bool find_account(char *wanted, struct account *account) {
    char *group = wanted, *user = strsep(&group, ":");
    if (!find_user(user, account)) {
        fprintf(stderr, "triarch: there is no user '%s' in /etc/passwd\n", user);
        return false;
    }
    if (!group) {
        if (account->name)
            add_supplementary(account);
        return true;
    }
    if (find_group(group, &account->gid))
        return true;
    fprintf(stderr, "triarch: there is no group '%s' in /etc/group\n", group);
    return false;
}

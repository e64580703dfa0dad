/* A hash table from 64-bit numbers to pointers: linear probing, grows, no iteration order. Not thread-safe. */
#ifndef PD_TABLE_H
#define PD_TABLE_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct {
    uint64_t key;
    void *value; /* NULL: empty */
} pd_entry;

typedef struct {
    pd_entry *entries;
    size_t room, count; /* room: a power of two, or 0 */
} pd_table;

static inline size_t pd_table_slot(const pd_table *table, uint64_t key)
{
    return (size_t)((key * 0x9E3779B97F4A7C15u) >> 20) & (table->room - 1);
}

static inline void *pd_table_get(const pd_table *table, uint64_t key)
{
    if (!table->room)
        return NULL;
    for (size_t i = pd_table_slot(table, key); table->entries[i].value; i = (i + 1) & (table->room - 1))
        if (table->entries[i].key == key)
            return table->entries[i].value;
    return NULL;
}

static inline void pd_table_place(pd_table *table, uint64_t key, void *value)
{
    size_t i = pd_table_slot(table, key);
    while (table->entries[i].value)
        i = (i + 1) & (table->room - 1);
    table->entries[i] = (pd_entry){key, value};
    table->count++;
}

/* The key must not be in the table. False without memory. */
static inline bool pd_table_put(pd_table *table, uint64_t key, void *value)
{
    if (2 * (table->count + 1) > table->room) {
        pd_table grown = {NULL, table->room ? 2 * table->room : 64, 0};
        grown.entries = calloc(grown.room, sizeof *grown.entries);
        if (!grown.entries)
            return false;
        for (size_t i = 0; i < table->room; i++)
            if (table->entries[i].value)
                pd_table_place(&grown, table->entries[i].key, table->entries[i].value);
        free(table->entries);
        *table = grown;
    }
    pd_table_place(table, key, value);
    return true;
}

static inline void *pd_table_remove(pd_table *table, uint64_t key)
{
    void *found = pd_table_get(table, key);
    if (!found)
        return NULL;
    size_t mask = table->room - 1, hole = pd_table_slot(table, key);
    while (table->entries[hole].key != key)
        hole = (hole + 1) & mask;
    /* Entries behind the hole that hashed to it or before move up, so that no search ends early. */
    for (size_t i = (hole + 1) & mask; table->entries[i].value; i = (i + 1) & mask) {
        size_t home = pd_table_slot(table, table->entries[i].key);
        if (((i - home) & mask) >= ((i - hole) & mask)) {
            table->entries[hole] = table->entries[i];
            hole = i;
        }
    }
    table->entries[hole].value = NULL;
    table->count--;
    return found;
}

#endif

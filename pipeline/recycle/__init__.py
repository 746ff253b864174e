"""KV states kept across runs: a store on disk that knows token ids, never text.

```
 identity   which model, tokenizer, dtype, rope: who may meet whose states
 head       the file of one entry up to its KV          entry   the KV itself, mapped and checked
 tree       which prefixes are there, by token ids      index   the tree as one file, to open fast
 folder     names, temporary files, quarantine          catalogue   folder and tree kept in step
 store      match, load, put
```
"""

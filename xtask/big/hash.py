import hashlib
rounds, seen, digest = ROUNDS, {}, b"x"
for i in range(rounds):
    digest = hashlib.sha256(digest + str(i).encode()).digest()
    seen[i % 1009] = seen.get(i % 1009, 0) + digest[0]
    if i % (rounds // 10) == 0:
        print(i, digest.hex(), flush=True)
print(sum(seen.values()), sorted(seen.items())[:5], digest.hex())

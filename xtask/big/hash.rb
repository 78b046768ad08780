rounds, seen, hash = ROUNDS, Hash.new(0), 14695981039346656037
rounds.times do |i|
  hash = ((hash ^ (i & 255)) * 1099511628211) & 0xffffffffffffffff
  seen["k#{hash % 997}"] += 1
  puts "#{i} #{hash.to_s(16)}" if i % (rounds / 10) == 0
end
puts seen.values.sum, seen.keys.sort.first(5).join(","), hash.to_s(16)
